"""Float8Linear: a linear layer whose three GEMMs each have a precision of their own.

    fprop  y  = x  w^T   x  [M, K]  w  [N, K]
    dgrad  dx = dy w     dy [M, N]  w^T [K, N]
    wgrad  dw = dy^T x   dy^T [N, M]  x^T [K, M], FP32
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fp8train.backends import select_backend
from fp8train.nn.gathered import GatheredWeight, follow_sharding
from fp8train.nn.inputs import InputCache, QuantizedInput
from fp8train.nn.linear_function import APPLY, InplaceGrad, LinearFunction, Plan
from fp8train.nn.operands import refuse_transforms
from fp8train.nn.remedies import InputRemedy
from fp8train.nn.weights import OPERANDS, LocalWeight, SeenWeight, keep_current
from fp8train.quant.formats import BLOCKWISE, LinearPrecision
from fp8train.shards import is_sharded, sent_as

HIGH = (torch.bfloat16, torch.float32)  # dtypes of an input
_SITES = itertools.count(1)  # 0 is coverage.NOT_COUNTED


class Float8Linear(nn.Linear):
    """nn.Linear with a precision per GEMM; parameters, names and state dict are nn.Linear's, the weight an FP32 master.

    Takes [..., in_features] in bf16 or fp32 (or a QuantizedInput) and returns [..., out_features] in the same dtype, or
    in autocast's. Every converted linear is of this class, those that stay in BF16 too, so that a comparison isolates
    FP8.

    Args:
        in_features, out_features: any sizes; short last blocks are blocks of their own.
        bias: add an FP32 bias in the epilogue.
        precision: what the three GEMMs compute with; the `blockwise` recipe's by default.
        backend: "auto" or a backend's name.
        device: where the parameters live; "meta" lays the layer out without memory.

    Raises:
        BackendError: the backend cannot run here, or cannot serve the precision.
    """

    plan: Plan
    w_qdata: Tensor
    w_scale_inv: Tensor
    wt_qdata: Tensor
    wt_scale_inv: Tensor
    w_high: Tensor
    channel_scale: Tensor | None
    _seen: tuple[SeenWeight, ...]  # the weights that the operands were made from
    _trained: bool  # whether that was in training
    _stepped = False  # whether they were made by a step of an optimizer on the very weight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        precision: LinearPrecision = BLOCKWISE,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=torch.float32)
        self._setup(precision, select_backend(backend, self.weight.device.type, [precision]).backend.name)

    @classmethod
    def from_linear(cls, linear: nn.Linear, precision: LinearPrecision, backend: str) -> Float8Linear:
        """A Float8Linear with the very Parameter objects, training flag and hooks-free state of `linear`.

        Args:
            linear: its weight must be FP32.
            precision: what the GEMMs compute with.
            backend: name of a backend that serves it ("auto" is resolved by convert_model).

        Raises:
            ValueError: the weight is not FP32.
        """
        if linear.weight.dtype is not torch.float32:
            raise ValueError(
                f"Float8Linear: weight is {linear.weight.dtype}; needs torch.float32, the master of the codes. "
                "Call model.float() before converting."
            )
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.weight, made.bias = linear.weight, linear.bias
        made.train(linear.training)
        made._setup(precision, backend)
        return made

    @classmethod
    def take_place(cls, linear: nn.Linear, made: Float8Linear) -> Float8Linear:
        """Turn `linear` itself into what `made` is, which was made from it and is not used again.

        Whatever else refers to it, such as a list beside the module tree, has the Float8Linear then; its hooks stay.
        """
        linear.__dict__.update({name: value for name, value in vars(made).items() if name not in vars(linear)})
        linear.__class__ = cls
        assert isinstance(linear, Float8Linear)
        linear.register_load_state_dict_post_hook(_after_load)
        keep_current(linear)
        return linear

    def _setup(self, precision: LinearPrecision, backend: str) -> None:
        self.plan = Plan(precision, backend, next(_SITES))
        self.inputs = InputCache()
        self.provider: LocalWeight | GatheredWeight = LocalWeight()
        self.grad_sink: InplaceGrad | None = None
        self.remedy: InputRemedy | None = None
        for name in OPERANDS:
            setattr(self, name, None)
        self.register_load_state_dict_post_hook(_after_load)
        self._seen = ()
        self.refresh_weight()
        keep_current(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is known of weights here."""
        return {**self.__dict__, "_seen": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or an unpickled linear, counts for itself and follows its own optimizer."""
        super().__setstate__(state)
        for name in OPERANDS:  # one that was pickled when they were buffers has them there
            self.__dict__.setdefault(name, self._buffers.pop(name, None))
        self.plan = Plan(self.plan.precision, self.plan.backend, next(_SITES))
        keep_current(self)

    # parts of the plan by their names; what runs in every step reads the plan, since a property costs a call

    @property
    def precision(self) -> LinearPrecision:
        """What the three GEMMs compute with; set_precision changes it."""
        return self.plan.precision

    @property
    def backend_name(self) -> str:
        """Name of the backend that computes them."""
        return self.plan.backend

    @property
    def site(self) -> int:
        """Number under which coverage counts them."""
        return self.plan.site

    def set_precision(self, precision: LinearPrecision, backend: str | None = None) -> None:
        """Compute with another precision from now on, and on another backend if given; the weight's operands are made
        anew.
        """
        self.plan = Plan(precision, self.plan.backend if backend is None else backend, self.plan.site)
        self.forget_weight()
        self.refresh_weight()

    def refresh_weight(self, whole: bool = False) -> None:
        """Make the weight's operands from the master now; those of a weight that is sharded, when they are needed.

        Args:
            whole: see follow_sharding.

        Raises:
            ValueError: the weight is not FP32, or not sent as that, or of a class that gives no whole matrix.
        """
        if self.weight.is_meta:
            return
        if self.weight.dtype is not torch.float32:
            raise ValueError(
                f"Float8Linear: weight is {self.weight.dtype}; needs torch.float32, the master of its codes. "
                "Cast the activations instead of the model, or call model.float(); under fully_shard leave "
                "MixedPrecisionPolicy's param_dtype None; for DeepSpeed write torch_autocast in place of bf16 or fp16."
            )
        if (sent := sent_as(self.weight)) is not torch.float32:
            raise ValueError(
                f"Float8Linear: weight is sent between ranks as {sent}, by torch_autocast of DeepSpeed; needs "
                "torch.float32. Convert before deepspeed.initialize; leave Float8Linear out of "
                "lower_precision_safe_modules."
            )
        follow_sharding(self, whole)
        if self.weight.dim() != 2 and isinstance(self.provider, LocalWeight):  # FSDP1's, between two forwards
            self.forget_weight()
            return
        # not as inference tensors, even if an evaluation asks first: training will save them for backward
        with torch.inference_mode(False), torch.no_grad():
            self.provider.refresh(self)
        self._seen = tuple(SeenWeight(weight, self.provider.exchanges) for weight in self._sources())
        self._trained, self._stepped = self.training, False

    def refresh_if_stale(self, whole: bool = False) -> None:
        """As refresh_weight, where the weight was replaced or written in place since.

        Or where train() or eval() was called: with these go writes through `.data` that nobody sees, such as an
        exchange of the weights for their average. Gathered operands are those of the weight as it was sharded.
        """
        if self.provider.gathered is not None and not is_sharded((self.weight,)):
            return
        if self.remedy is None and len(self._seen) == 1:  # the usual case, without a list
            if self.training is not self._trained or not self._seen[0].is_that(self._parameters.get("weight")):
                self.refresh_weight(whole)
            return
        weights, switched = self._sources(), len(self._seen) > 0 and self.training is not self._trained
        if switched or len(weights) != len(self._seen) or not all(map(SeenWeight.is_that, self._seen, weights)):
            self.refresh_weight(whole)

    def scaled_by(self) -> tuple[Float8Linear, ...]:
        """Gate and up projection whose weights scale the channels of the input, if any do in this precision."""
        smooth = None if self.remedy is None else self.remedy.smooth
        return () if smooth is None or not self.plan.precision.quantized else smooth

    def _sources(self) -> tuple[Tensor, ...]:
        """The weights that the operands depend on, as an optimizer has them."""
        gathered = [(linear, linear.provider.gathered) for linear in (self, *self.scaled_by())]
        return tuple(linear.weight if sharded is None else sharded.master for linear, sharded in gathered)

    def set_remedy(self, remedy: InputRemedy | None) -> None:
        """Treat the input so from now on, before it is rounded; the weight's operands are made anew."""
        self.remedy = remedy
        self.forget_weight()
        self.refresh_weight()

    def prepared(self, x: Tensor) -> Tensor:
        """x [..., K] as the GEMMs read it: clamped and scaled as the remedy says."""
        if self.remedy is None:
            return x
        if self.remedy.clamp is not None:
            x = x.clamp(-self.remedy.clamp, self.remedy.clamp)
        return x if self.channel_scale is None else x * self.channel_scale.to(x.dtype)

    def prepared_weight(self) -> Tensor:
        """The master weight [N, K] with the inverse of what `prepared` does to the channels of x."""
        return self.weight if self.channel_scale is None else self.weight / self.channel_scale

    def forget_weight(self) -> None:
        """Drop the weight's operands, and what it was when they were made."""
        for name in OPERANDS:
            setattr(self, name, None)
        self._seen = ()

    def _replicate_for_data_parallel(self) -> Float8Linear:
        """A replica of nn.DataParallel makes the operands of its own device."""
        replica: Float8Linear = super()._replicate_for_data_parallel()
        replica.forget_weight()
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        """Moving or casting drops the operands: codes must not be cast, and are made anew on the new device."""
        self.forget_weight()
        super()._apply(fn, recurse)
        if self.weight.dtype is torch.float32:  # here and not at the next forward, which may be a compiled one
            self.refresh_weight()
            self._seen = ()  # for to_empty: what will be written, no version counts if it is through `.data`
        return self

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """y = x w^T + bias.

        Args:
            x: [..., in_features] bf16 or fp32.

        Raises:
            ValueError: the last dimension, the dtype or the ready-made codes of x do not fit; autocast is on in FP16.
            RuntimeError: a transform of torch.func or torch.jit.trace is active.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            refuse_transforms()
            if "weight" not in self._parameters:
                if not parametrize._cache_enabled:
                    with parametrize.cached():  # one weight for codes and gradients, though it is made in each look
                        return self.forward(x)
                _ = self.weight  # made here, with its graph, and not first where there is no gradient
            self.refresh_if_stale()
        tensor = x.x if isinstance(x, QuantizedInput) else x
        out_dtype = self.checked_input(tensor)
        parameters: dict[str, Any] = self._parameters  # asked of the module, each is looked up in Python, for 1 us
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # a parametrisation has taken its place
            weight, bias = self.weight, self.bias
        wgrad = weight.requires_grad and torch.is_grad_enabled()
        if self.remedy is not None:
            self._check_remedy(x)
            x = tensor = self.prepared(tensor)
            weight = self.prepared_weight()
        plan = self.plan
        needs = plan.needs[wgrad]
        if isinstance(x, QuantizedInput):
            row, col = x.operands(needs)
        else:
            row, col = self.inputs.get(x, needs, plan.backend, plan.site)
        w, wt = self.provider.operands(self)
        apply = LinearFunction.apply if compiling else APPLY
        return apply(tensor, weight, bias, (row, col, w, wt), plan, out_dtype, self.grad_sink)

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        """What nn.Module calls in place of forward under torch.jit.trace, and only there."""
        raise RuntimeError(
            "Float8Linear: torch.jit.trace is active; needs torch.export.export or torch.compile, since the codes of "
            "this input would be constants of the trace. Export the model instead."
        )

    def checked_input(self, x: Tensor) -> torch.dtype:
        """Raise ValueError unless x fits; gives the dtype of the result."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"Float8Linear: x is {list(x.shape)}; needs [..., {self.in_features}].")
        dtype = x.dtype
        if dtype not in HIGH:
            raise ValueError(
                f"Float8Linear: x is {dtype}; needs torch.bfloat16 or torch.float32. Cast it before the layer."
            )
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            if dtype is torch.float16:
                raise ValueError("Float8Linear: autocast is on in torch.float16; needs torch.bfloat16. Change it.")
        return dtype

    def _check_remedy(self, x: Tensor | QuantizedInput) -> None:
        if isinstance(x, QuantizedInput) or (self.channel_scale is not None and self.grad_sink is not None):
            got = "codes made elsewhere" if isinstance(x, QuantizedInput) else "a gradient sink"
            raise ValueError(f"Float8Linear: a remedy for its input meets {got}; needs a plain tensor and no sink.")

    def extra_repr(self) -> str:
        gemms = ", ".join(f"{name}: {self.precision.describe(name)}" for name in self.precision.gemms)
        shape = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{shape}, precision={self.precision.name} ({gemms}), backend={self.backend_name}"


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, Float8Linear)
    module.refresh_weight()
