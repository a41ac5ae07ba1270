"""A sharded weight is gathered as what its GEMMs multiply: FP8 codes, a byte an element, or BF16; not the FP32 master.

Each rank rounds its own rows, to FP8 once per optimizer step. FSDP2 asks the rows of a parameter what to send
(fsdp_pre_all_gather), and hands over what has come of all ranks (fsdp_post_all_gather).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fp8train.errors import ConfigError
from fp8train.nn.gathered import follow_sharding
from fp8train.nn.operands import LaterOperand, Operand, transposed
from fp8train.nn.spread_rows import SpreadRows, quantize_spread
from fp8train.nn.weights import SeenWeight, converted_linears, own_weights
from fp8train.quant.formats import LinearPrecision, QuantSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from fp8train.nn.linear import Float8Linear

CODES, BF16, MASTER = "codes", "bf16", "master"
ELEMENT_BYTES = {CODES: 1, BF16: 2, MASTER: 4}


def gathered_form(precision: LinearPrecision) -> str:
    """CODES where w.T has the codes of w, BF16 where both are the master in BF16, else MASTER."""
    fprop, dgrad = precision.fprop.right, precision.dgrad.right
    if fprop is not None:
        return CODES if fprop == dgrad and fprop.transposable else MASTER
    return BF16 if dgrad is None and precision.high is torch.bfloat16 and not precision.noise else MASTER


class OwnCodes(NamedTuple):
    """What a rank sends of a weight, uint8, and the master that it was made of."""

    spec: QuantSpec
    data: Tensor
    master: SeenWeight


class GatheredOperand:
    """What a linear's weight [N, K] is gathered as: what this rank sends, and what has come.

    While its layer computes, linear.weight is NaN in the master's shape, there for its gradient, FP32 [N, K]; unless
    the master itself was gathered.

    Args:
        linear: its provider asks for `operands`.
        parameter: FSDP2's record of the weight.
        peers: those of all weights of the model: they are rounded together.
    """

    def __init__(self, linear: Float8Linear, parameter: Any, peers: Sequence[GatheredOperand]) -> None:
        self.linear, self._parameter, self._peers = linear, parameter, peers
        self.shown = False  # send the master, for somebody looks at it
        self._form = ""  # of what came last
        self._own: OwnCodes | None = None
        self._arrived = self._scale_inv = torch.empty(0)
        rows = parameter._sharded_local_tensor
        rows.fsdp_pre_all_gather, rows.fsdp_post_all_gather = self._send, self._take
        parameter._init_extensions()

    @property
    def held_bytes(self) -> int:
        """Of what this rank keeps from step to step in this precision: codes of its rows, and all scales."""
        spec, size = self.linear.plan.precision.fprop.right, self._parameter.padded_sharded_param_size
        if gathered_form(self.linear.plan.precision) != CODES or spec is None:
            return 0
        return int(size.numel() + 4 * math.prod(spec.scale_shape(*self._parameter._orig_size)))

    def forget(self) -> None:
        """The master was written: codes are made anew before they are sent again."""
        self._own = None

    def operands(self) -> tuple[Operand, Operand | LaterOperand] | None:
        """w [N, K] for fprop, and w.T [K, N] for dgrad or what makes it; None where the master has come.

        Raises:
            RuntimeError: the precision was changed while the layer is whole.
        """
        plan = self.linear.plan
        if self._form != self._wanted():
            raise RuntimeError(
                f"Float8Linear: precision {plan.precision.name!r} was set while its layer is gathered as {self._form}; "
                "needs a layer that is sharded. Set it between two steps, after reshard()."
            )
        if self._form == MASTER:
            return None
        if self._form == BF16:
            return Operand(self._arrived), Operand(self._arrived.t())
        spec = plan.precision.fprop.right
        assert spec is not None
        w = Operand(self._arrived, self._scale_inv, spec)
        return w, LaterOperand(partial(transposed, spec=spec, backend=plan.backend), w.tensors())

    def _wanted(self) -> str:
        return MASTER if self.shown else gathered_form(self.linear.plan.precision)

    def _send(self, mesh: DeviceMesh, size: torch.Size, stride: Any, module: nn.Module, policy: Any) -> Any:
        """This rank's rows, with zeros to the length of the first rank's."""
        form, parameter = self._wanted(), self._parameter
        if form != self._form:  # FSDP2 has room for what came first, and reuses it
            parameter.all_gather_outputs = []
            vars(parameter).pop("_unsharded_param", None)
            self._form = form
        if form == CODES:
            if self._stale():
                _round([peer for peer in self._peers if peer._stale()], mesh.get_group())
            assert self._own is not None
            return (self._own.data,), None
        rows = parameter._sharded_local_tensor.detach()
        return (self._padded(rows.to(torch.bfloat16) if form == BF16 else rows),), None

    def _take(self, came: Sequence[Tensor], metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        """Keep what came; the first time also give what FSDP2 makes linear.weight of."""
        if out is not None:  # it is in the memory that came before
            return None
        (whole,) = came
        if self._form == MASTER:
            return whole, ()
        whole = whole[: self.linear.out_features]
        self._arrived = whole if self._own is None or self._form == BF16 else whole.view(self._own.spec.format.dtype)
        return whole.new_empty(0, dtype=dtype).as_subclass(_Unread), ()

    def _stale(self) -> bool:
        """Whether codes are wanted, and there are none in this precision and of the master as it is."""
        if self._wanted() != CODES:
            return False
        own, spec = self._own, self.linear.plan.precision.fprop.right
        return own is None or own.spec != spec or not own.master.is_that(self._parameter.sharded_param)

    def rows(self, rank: int) -> SpreadRows:
        """This rank's rows of the master."""
        parameter, plan = self._parameter, self.linear.plan
        each, (n, k) = parameter.padded_sharded_param_size[0], parameter._orig_size
        assert plan.precision.fprop.right is not None
        return SpreadRows(
            rows=parameter._sharded_local_tensor.detach(), start=min(rank * each, n), each=each, shape=(n, k),
            spec=plan.precision.fprop.right, backend=plan.backend,
        )  # fmt: skip

    def keep(self, rows: SpreadRows, codes: Tensor, scale_inv: Tensor) -> None:
        """Keep codes of this rank's rows, and the scales of the whole weight."""
        master = SeenWeight(self._parameter.sharded_param, exchanges=False)
        self._own = OwnCodes(rows.spec, self._padded(codes.view(torch.uint8)), master)
        if self._scale_inv.shape == scale_inv.shape:
            self._scale_inv.copy_(scale_inv)  # a compiled graph keeps its address
        else:
            self._scale_inv = scale_inv.clone()

    def _padded(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, self._parameter.padded_sharded_param_size[0] - rows.shape[0]))


def _round(weights: Sequence[GatheredOperand], group: dist.ProcessGroup) -> None:
    """Make the codes of these weights; every rank must call it, for the same ones."""
    rank = dist.get_rank(group)
    matrices = [weight.rows(rank) for weight in weights]
    for weight, rows, made in zip(weights, matrices, quantize_spread(matrices, group), strict=True):
        weight.keep(rows, *made)


class _Unread(Tensor):
    """What FSDP2 makes linear.weight of by as_strided, which gives one NaN in the shape that is asked for."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.as_strided:
            return torch.full((), float("nan"), dtype=args[0].dtype, device=args[0].device).expand(args[1])
        return super().__torch_function__(func, types, args, kwargs or {})


def gather_operands(model: nn.Module) -> None:
    """From now on the weights of a converted and sharded model are gathered as what their GEMMs multiply.

    FP8 codes (1 byte an element) or BF16 (2), in place of FP32 masters (4): the same numbers. Weights that another
    module holds too, and those whose precision needs the master, are gathered as before.

    Args:
        model: after convert_model and torch's fully_shard, in this order.

    Raises:
        ValueError: there is no sharded Float8Linear, or FSDP2 casts or offloads its weights.
        ConfigError: this torch's FSDP2 has other parts, or the recipe treats inputs of sharded linears (`swiglu`).
    """
    alone, peers = own_weights(model), list[GatheredOperand]()
    linears = {id(linear) for linear in converted_linears(model)}
    try:
        for parameter in _fsdp_parameters(model):
            owner, linear = parameter._module_info, parameter._module_info.module
            if owner.param_name != "weight" or id(linear) not in linears or id(linear.weight) not in alone:
                continue
            if parameter.offload_to_cpu or parameter.mp_policy.param_dtype is not None:
                raise ValueError(
                    "gather_operands: fully_shard offloads or casts weights; needs FP32 masters on the device. Leave "
                    "out its offload_policy, and MixedPrecisionPolicy's param_dtype."
                )
            follow_sharding(linear)
            peers.append(GatheredOperand(linear, parameter, peers))
            linear.provider.gathered = peers[-1]
    except AttributeError as error:
        raise ConfigError(
            f"parallel.gather: got operands with torch {torch.__version__}, whose FSDP2 has other parts ({error}); "
            "needs torch 2.11 to 2.13. Set parallel.gather=fp32."
        ) from error
    if linears and not peers:
        raise ValueError(
            f"gather_operands: {type(model).__name__} has no sharded Float8Linear; needs one. Call convert_model, then "
            "fully_shard, then this."
        )


def element_bytes(model: nn.Module) -> dict[int, int]:
    """By id of a weight, bytes in which gather_operands would have its elements gathered."""
    alone = own_weights(model)
    return {
        id(linear.weight): ELEMENT_BYTES[gathered_form(linear.precision)]
        for linear in converted_linears(model)
        if id(linear.weight) in alone
    }


def _fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    """FSDP2's records of the parameters that it shards."""
    from torch.distributed.fsdp import FSDPModule  # takes seconds

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            for group in groups:
                yield from group.fsdp_params if group is not None else ()


def show_weights(linears: Iterable[Float8Linear], shown: bool) -> None:
    """Whether linear.weight is there while its layer computes; on every rank at a time, and between two steps.

    It always is but where `gather_operands` has been.
    """
    for linear in linears:
        if (gathered := linear.provider.gathered) is not None:
            gathered.shown = shown
