"""The weight as GEMM operands: made from the FP32 master once per optimizer step, reused by every micro-batch.

Codes are attributes of the linear, not buffers, which others average, send and check as if they were numbers of the
model. They are rewritten in place, eagerly and outside any compiled graph: after a step of an optimizer that has the
weight, after a state dict is loaded, after `weights_changed`; at the first forward after the linear was moved, or
changed between training and evaluation; where no optimizer has the weight, at the first forward after a step of one
that has no linear's, and so perhaps copies that are written back through `.data` (ZeRO of DeepSpeed); and at the next
forward after any in-place edit that autograd's version counter sees and any exchange of `.data`. In a compiled graph
the operator of fprop looks for itself, unless CUDA replays a recorded graph, or the input is scaled by other weights
(`smooth`). Any other write through `.data`, by torch.distributed (broadcast, receive) or by numpy is invisible:
announce it with `weights_changed`; `check_weights` finds it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fp8train.backends import get_backend
from fp8train.backends.ops import before_fprop
from fp8train.errors import ConfigError
from fp8train.nn.operands import LaterOperand, Operand, quantized, transposed
from fp8train.nn.remedies import channel_scale
from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.shards import is_fsdp_module

if TYPE_CHECKING:
    from fp8train.nn.linear import Float8Linear

COPIES = ("both", "one")  # of an FP8 weight that are kept from step to step; see LocalWeight
OPERANDS = ("w_qdata", "w_scale_inv", "wt_qdata", "wt_scale_inv", "w_high", "channel_scale")


# every linear of the process by its site, however it came to be (made, copied, unpickled); the same order on all ranks
_LIVE: weakref.WeakValueDictionary[int, Float8Linear] = weakref.WeakValueDictionary()


def keep_current(linear: Float8Linear) -> None:
    """From now on an optimizer step that writes the linear's weight makes its operands anew."""
    _LIVE[linear.site] = linear


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # by identity, not by version: fused optimizers do not move the version counter of what they write
    stepped = {_memory(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own, others = [], []
    for linear in list(_LIVE.values()):
        linear.inputs.clear()  # an input may itself be a parameter that was stepped
        gathered = linear.provider.gathered  # its layer may be whole, and then has another weight than the optimizer
        weight = linear._parameters.get("weight") if gathered is None else gathered.master
        if weight is None:
            continue
        sources = (weight,) if linear.remedy is None else linear._sources()
        if not stepped.isdisjoint(map(_memory, sources)):
            own.append(linear)
        elif not linear._stepped and any(source.requires_grad for source in sources):
            others.append(linear)
    for linear in own:
        linear.refresh_weight()
        linear._stepped = True
    if not own:
        for linear in others:
            linear._seen = ()  # what was stepped may be copies, which will be written over the weights through `.data`


def _memory(weight: Tensor) -> int:
    """Tells apart what is stored apart: a weight may be a part of the flat parameter that is stepped."""
    return weight.untyped_storage()._cdata if type(weight) in (Tensor, nn.Parameter) else id(weight)


def _follow(site: int) -> None:
    """As an eager forward does. An input that is scaled by other weights has been scaled before it comes here."""
    linear = _LIVE.get(site)
    if linear is None or not isinstance(linear.provider, LocalWeight):
        return
    if not linear.scaled_by():
        linear.refresh_if_stale()
    elif not linear._seen and linear.channel_scale is not None:
        used = linear.channel_scale.clone()
        linear.refresh_if_stale()
        if not torch.equal(used, linear.channel_scale):
            raise ConfigError(
                "Float8Linear: the input was scaled by weights that changed without a sign before a compiled forward "
                "(swiglu: smooth); needs a sign. Call fp8train.weights_changed(model) after each step, do not compile, "
                "or take `smooth` out of the recipe."
            )


register_optimizer_step_post_hook(_after_step)
before_fprop(_follow)


class SeenWeight:
    """A weight as it was when its operands were made.

    Args:
        weight: an FP32 master.
        exchanges: whether to notice that `.data` was exchanged, which counts no version. The storage is held weakly: an
            address alone may be used again.
    """

    __slots__ = ("_address", "_storage", "_version", "_weight")

    def __init__(self, weight: Tensor, exchanges: bool) -> None:
        exchanges = exchanges and type(weight) is nn.Parameter and not weight.is_meta
        self._weight, self._version = weight, _version(weight)
        self._address = weight.data_ptr() if exchanges else 0
        self._storage = StorageWeakRef(weight.untyped_storage()) if exchanges else None

    def is_that(self, weight: Tensor | None) -> bool:
        """Whether the weight is the same, and nothing that can be seen has been done to it since."""
        if weight is not self._weight or _version(weight) != self._version:
            return False
        return self._storage is None or (weight.data_ptr() == self._address and not self._storage.expired())


def _version(weight: Tensor) -> int:
    """The weight's version counter; an inference tensor has none, so edits of one must be announced."""
    return -1 if weight.is_inference() else weight._version


class LocalWeight:
    """Provider of a weight that this process holds whole; nn/gathered.py has the one of a sharded weight.

    Args:
        copies: "both": FP8 codes of w for fprop and of w.T for dgrad are kept from step to step. "one": those of w are,
            and backward makes those of w.T, for as long as a layer's dgrad needs them: from those of w where they are
            the same, else from the master.
    """

    exchanges = True  # see SeenWeight
    gathered = None  # see GatheredWeight
    copies = COPIES[0]  # of one that was pickled before there was a choice

    def __init__(self, copies: str = COPIES[0]) -> None:
        self.copies = copies

    def refresh(self, linear: Float8Linear) -> None:
        """Make the operands anew from linear.weight, into the linear's attributes."""
        for name, tensor in self.made(linear).items():
            _rewrite(linear, name, tensor)

    def made(self, linear: Float8Linear, anew: bool = False) -> dict[str, Tensor | None]:
        """Operands of linear.weight by name; unless `anew` they may be those that the linear holds, rewritten."""
        precision, weight = linear.precision, linear.weight.detach()
        made: dict[str, Tensor | None] = dict.fromkeys(OPERANDS)
        if scaled_by := linear.scaled_by():
            gate, up = scaled_by
            made["channel_scale"] = scale = channel_scale(gate.weight, up.weight).to(weight.device)
            weight = weight / scale
        fprop, dgrad = _quantized_weight(weight, precision, linear, self.copies == "both", anew)
        if fprop is not None:
            made["w_qdata"], made["w_scale_inv"] = fprop.qdata, fprop.scale_inv
        if dgrad is not None:
            made["wt_qdata"], made["wt_scale_inv"] = dgrad.qdata, dgrad.scale_inv
        if None in (precision.fprop.right, precision.dgrad.right) and _has_high_copy(precision):
            made["w_high"] = quantized(weight, None, precision.high, False, linear.backend_name, precision.noise).data
        return made

    def operands(self, linear: Float8Linear) -> tuple[Operand, Operand | LaterOperand]:
        """(w [N, K] for fprop, w.T [K, N] for dgrad, or what makes it)."""
        precision = linear.plan.precision
        fprop, dgrad = precision.fprop.right, precision.dgrad.right
        wt: Operand | LaterOperand
        held: dict[str, Any] = linear.__dict__
        if fprop is None or dgrad is None:
            high = held["w_high"] if _has_high_copy(precision) else linear.weight.detach()
        w = Operand(high) if fprop is None else Operand(held["w_qdata"], held["w_scale_inv"], fprop)
        if dgrad is None:
            wt = Operand(high.t())
        elif self.copies == "both":
            wt = Operand(held["wt_qdata"], held["wt_scale_inv"], dgrad)
        elif fprop == dgrad and fprop.transposable:
            wt = LaterOperand(partial(transposed, spec=dgrad, backend=linear.plan.backend), w[:2])
        else:
            make = partial(_from_master, spec=dgrad, backend=linear.plan.backend)
            wt = LaterOperand(make, (linear.weight.detach(), held["channel_scale"]))
        return w, wt


def _from_master(
    weight: Tensor, channel_scale: Tensor | None, after: Tensor | None, *, spec: QuantSpec, backend: str
) -> Operand:
    """w.T [K, N] from the master of forward; see LaterOperand."""
    weight = weight if channel_scale is None else weight / channel_scale
    return quantized(weight, spec, torch.float32, True, backend)


@torch.no_grad()
def weight_operand(linear: Float8Linear, turned: bool) -> Operand:
    """w [N, K] for fprop, or w.T [K, N] for dgrad, made from the master now."""
    precision, weight = linear.plan.precision, linear.prepared_weight().detach()
    spec = precision.dgrad.right if turned else precision.fprop.right
    return quantized(weight, spec, precision.high, turned, linear.plan.backend, precision.noise)


def _has_high_copy(precision: LinearPrecision) -> bool:
    """Whether operands in high precision are other numbers than the master's."""
    return precision.high is not torch.float32 or precision.noise > 0


def _quantized_weight(
    weight: Tensor, precision: LinearPrecision, linear: Float8Linear, both: bool, anew: bool
) -> tuple[QTensor | None, QTensor | None]:
    """Codes of w for fprop and, if `both`, of w.T for dgrad; None for an operand that stays in high precision.

    Unless `anew` they may be those that the linear holds, rewritten.
    """
    fprop, dgrad, backend = precision.fprop.right, precision.dgrad.right, get_backend(linear.backend_name)
    if fprop is not None and fprop == dgrad and fprop.transposable:
        w, w_scale, wt, wt_scale = (getattr(linear, name) for name in OPERANDS[:4])
        held = None if w is None else QTensor(w, w_scale, fprop)
        held_t = None if wt is None else QTensor(wt, wt_scale, fprop)
        out = None if anew or held is None or both == (held_t is None) else (held, held_t)
        return backend.quantize_square(weight, fprop, out, both)
    return (
        None if fprop is None else backend.quantize(weight, fprop, False),
        None if dgrad is None or not both else backend.quantize(weight, dgrad, True),
    )


def _rewrite(linear: Float8Linear, name: str, value: Tensor | None) -> None:
    """Set an operand in place where it can hold the value, so that compiled graphs keep its address."""
    held = getattr(linear, name)
    if held is value and held is not None:
        torch.autograd.graph.increment_version(held)  # a backend's kernel has written it, which autograd has not seen
        return
    if held is not None and value is not None and held.shape == value.shape and held.dtype == value.dtype:
        held.copy_(value)
    else:
        setattr(linear, name, value)


def converted_linears(model: nn.Module) -> list[Float8Linear]:
    """The Float8Linear modules of a model, each once."""
    from fp8train.nn.linear import Float8Linear

    return [module for module in model.modules() if isinstance(module, Float8Linear)]


def named_linears(model: nn.Module) -> dict[str, Float8Linear]:
    """converted_linears by module path."""
    from fp8train.nn.linear import Float8Linear

    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, Float8Linear)}


def own_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that one module alone holds."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {identity for identity, holders in seen.items() if holders == 1}


def weights_changed(model: nn.Module) -> None:
    """Quantise all weights of a converted model again, after a write that autograd cannot see.

    Such as one through `.data`, by a collective of torch.distributed, or by numpy into shared memory.

    Args:
        model: a converted model; its linears may be anywhere below it.

    Raises:
        ValueError: the model has no Float8Linear.
    """
    for linear in _some_linears(model, "weights_changed"):
        linear.refresh_weight()


def _some_linears(model: nn.Module, who: str) -> list[Float8Linear]:
    """The Float8Linear modules of a model, which must have one."""
    linears = converted_linears(model)
    if not linears:
        raise ValueError(
            f"{who}: {type(model).__name__} has no Float8Linear; needs one or more. Pass a converted model."
        )
    return linears


def check_weights(model: nn.Module) -> None:
    """Raise where codes are not those of the weights; costs a quantisation of each.

    What the next forward makes anew in any case counts as made. Codes of gathered weights are not looked at.

    Args:
        model: a converted model; its linears may be anywhere below it.

    Raises:
        ValueError: codes are of other weights; the message names the linears. Or the model has no Float8Linear.
    """
    linears = _some_linears(model, "check_weights")
    paths = {id(module): path for path, module in model.named_modules()}
    stale = [paths[id(linear)] for linear in linears if not _is_current(linear)]
    if stale:
        raise ValueError(
            f"check_weights: codes of {len(stale)} of {len(linears)} linears are of other weights: {', '.join(stale)}; "
            "needs those of the weights. Call fp8train.weights_changed(model) after writes through .data."
        )


@torch.inference_mode(False)
@torch.no_grad()
def _is_current(linear: Float8Linear) -> bool:
    """Whether what the next forward would multiply with is made from the weight as it is."""
    linear.refresh_if_stale()
    if linear.weight.is_meta or linear.weight.dim() != 2 or not isinstance(linear.provider, LocalWeight):
        return True
    made = {name: tensor for name, tensor in linear.provider.made(linear, anew=True).items() if tensor is not None}
    return all(torch.equal(_bytes(tensor), _bytes(getattr(linear, name))) for name, tensor in made.items())


def _bytes(operand: Tensor) -> Tensor:
    return operand.contiguous().view(torch.uint8)  # NaN is not equal to NaN


def install_weight_hooks(model: nn.Module) -> None:
    """Before each eager forward of `model`, make the operands anew of weights that were replaced or written in place.

    A linear does that for itself too; the hook on the root is for models whose parts are compiled one by one. Steps of
    an optimizer need no hook on the model. Calling it twice on a model does nothing the second time.
    """
    if not getattr(model, "_fp8train_hooks", False):
        model.register_forward_pre_hook(_refresh_stale)
        model._fp8train_hooks = True  # type: ignore[assignment]


def keep_from_fast_paths(model: nn.Module) -> None:
    """Let torch's encoder layers call their linears in evaluation too: without a hook they read the weights alone."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) or not converted_linears(module):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # it is there for those layers, and linears do not take it
        elif _look_on not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_look_on)


def _look_on(module: nn.Module, args: Any) -> None:
    return None


_look_on.reads_values = False  # type: ignore[attr-defined]


def _refresh_stale(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    whole = is_fsdp_module(model)
    for linear in converted_linears(model):
        linear.inputs.clear()
        if "weight" in linear._parameters:  # one that is made in each look is looked at by its linear, once
            linear.refresh_if_stale(whole)


@contextlib.contextmanager
def evaluation_precision(model: nn.Module, precision: LinearPrecision) -> Iterator[None]:
    """Run every converted linear of `model` in one precision, e.g. BF16, and restore each one's own afterwards."""
    linears = converted_linears(model)
    own = [linear.precision for linear in linears]
    try:
        for linear in linears:
            linear.set_precision(precision)
        yield
    finally:
        for linear, kept in zip(linears, own, strict=True):
            linear.set_precision(kept)
