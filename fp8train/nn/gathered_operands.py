"""A sharded weight is gathered as what its GEMMs multiply: FP8 codes, a byte an element, or BF16; not the FP32 master.

Each rank rounds its own rows, to FP8 once per optimizer step. FSDP2 asks the rows of a parameter what to send
(fsdp_pre_all_gather), and hands over what has come of all ranks (fsdp_post_all_gather). On the way come the scales of a
linear's input that follow from rows of other weights on all ranks (swiglu: smooth), whatever its weight is gathered as.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fp8train.nn.operands import LaterOperand, Operand, transposed
from fp8train.nn.remedies import channel_size, scale_of_size
from fp8train.nn.spread_rows import SpreadRows, gather_rows, quantize_spread
from fp8train.nn.weights import SeenWeight, converted_linears, own_weights
from fp8train.quant.formats import LinearPrecision, QuantSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from fp8train.nn.linear import Float8Linear

CODES = torch.uint8


class Form(NamedTuple):
    """What a weight is gathered as: codes of `spec`, else BF16, else the FP32 master itself."""

    dtype: torch.dtype
    spec: QuantSpec | None = None


MASTER = Form(torch.float32)


def gathered_form(precision: LinearPrecision) -> Form:
    """Codes where w.T has the codes of w, BF16 where both are the master in BF16, else MASTER."""
    fprop, dgrad = precision.fprop.right, precision.dgrad.right
    if fprop is not None:
        return Form(CODES, fprop) if fprop == dgrad and fprop.transposable else MASTER
    if dgrad is None and precision.high is torch.bfloat16 and not precision.noise:
        return Form(torch.bfloat16)
    return MASTER


class Made(NamedTuple):
    """What a rank has made for a weight, and the tensors that it was made of.

    spec, data, scale_inv: codes of its rows, uint8, and the scales of all of the weight; None where none were wanted.
    channel_scale: fp32 [K] of the linear's input; None where nothing scales it.
    """

    seen: tuple[SeenWeight, ...]
    spec: QuantSpec | None
    data: Tensor | None
    scale_inv: Tensor | None
    channel_scale: Tensor | None


class GatheredOperand:
    """What a linear's weight [N, K] is gathered as: what this rank sends, and what has come.

    FSDP2 takes it for this rank's rows, and asks it what torch calls all-gather extensions, whatever tensor the rows
    are in. While its layer computes, linear.weight is NaN in the master's shape, there for its gradient, FP32 [N, K];
    unless the master itself was gathered.

    Args:
        linear: its provider asks for `operands`.
        group: FSDP2's record of what is gathered together.
        parameter: that of the weight, in the group.
        peers: those of all weights of the model: they are rounded together.
        masters: gather the master in every precision.
    """

    def __init__(
        self, linear: Float8Linear, group: Any, parameter: Any, peers: Sequence[GatheredOperand], masters: bool
    ) -> None:
        self.linear, self._group, self._parameter, self._peers = linear, group, parameter, peers
        self._masters = masters
        self.ranks = dist.get_process_group_ranks(parameter.mesh_info.shard_process_group)
        self.shown = False  # send the master, for somebody looks at it
        self._form: Form | None = None  # of what was sent last
        self._made: Made | None = None
        self._noted: Made | None = None  # scales of which have come
        self._arrived = self._scale_inv = torch.empty(0)
        name, kind = "_sharded_local_tensor", type(parameter)
        getattr(kind, name)  # or this FSDP2 would not ask
        parameter.__class__ = type(kind.__name__, (kind,), {name: self})
        parameter._init_extensions()

    @property
    def master(self) -> nn.Parameter:
        """This rank's rows, as an optimizer has them."""
        parameter: nn.Parameter = self._parameter.sharded_param
        return parameter

    @property
    def form(self) -> Form:
        """What the weight is gathered as in this precision, but while it is shown."""
        return MASTER if self._masters else gathered_form(self.linear.plan.precision)

    @property
    def held_bytes(self) -> int:
        """Of what this rank keeps from step to step in this precision: codes of its rows, and all scales twice."""
        spec = self.form.spec
        return 0 if spec is None else self.size().numel() + 2 * 4 * math.prod(spec.scale_shape(*self._shape))

    def forget(self) -> None:
        """The master was written: what is made of it is made anew before it is sent again."""
        self._made = None

    def operands(self) -> tuple[Operand, LaterOperand] | None:
        """w [N, K] for fprop, and what makes w.T [K, N] for dgrad; None where the master has come.

        Raises:
            RuntimeError: the precision was changed while the layer is whole.
        """
        form, plan, unscaled = self._form, self.linear.plan, self.linear.channel_scale is None
        if form not in (None, MASTER, self._wanted()) or unscaled == bool(self.linear.scaled_by()):
            raise RuntimeError(
                f"Float8Linear: precision {plan.precision.name!r} was set while its layer is whole, in "
                f"{form and (form.spec or form.dtype)}; needs a layer that is sharded. Set it between two steps, after "
                "reshard()."
            )
        if form is None or form == MASTER:
            return None
        w = Operand(self._arrived, self._scale_inv if form.spec else None, form.spec)
        return w, LaterOperand(partial(_turned, spec=form.spec, backend=plan.backend), w.tensors())

    def _wanted(self) -> Form:
        return MASTER if self.shown else self.form

    def size(self) -> torch.Size:
        """Of what every rank sends; FSDP2 asks for it too."""
        size: torch.Size = self._parameter.padded_sharded_param_size
        return size

    @property
    def _shape(self) -> tuple[int, int]:
        return self.linear.out_features, self.linear.in_features

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, size: torch.Size, stride: Any, module: nn.Module, policy: Any
    ) -> Any:
        """((this rank's rows, with zeros to the length of the first rank's,), what has been made for it, if anything).

        Raises:
            RuntimeError: the precision was changed between forward and backward.
        """
        form = self._wanted()
        if form != self._form:
            self._make_room(form)
        if self._stale():
            _make([peer for peer in self._peers if peer.ranks == self.ranks and peer._stale()], mesh.get_group())
        made = self._made if self._wants_any() else None
        if form.spec is not None:
            assert made is not None
            return (made.data,), made
        rows = self._parameter._sharded_param_data.view(self.size())
        if form != MASTER and made is not None:
            rows = rows / made.channel_scale
        return (rows.to(form.dtype),), made

    # FSDP2 inspects it at every gather of every weight, which takes several times as long as the call
    fsdp_pre_all_gather.__signature__ = inspect.signature(fsdp_pre_all_gather)  # type: ignore[attr-defined]

    def fsdp_post_all_gather(self, came: Any, made: Made | None, dtype: torch.dtype, *, out: nn.Parameter) -> None:
        """Note the scales of what has come to its room, where they were: autograd sees neither written."""
        if made is None or made is self._noted:
            return
        with torch.inference_mode(False), torch.no_grad():  # training will write to what an evaluation has made
            if made.scale_inv is not None:
                self._scale_inv = _noted(self._scale_inv, made.scale_inv)
            if made.channel_scale is not None:
                self.linear.channel_scale = _noted(self.linear.channel_scale, made.channel_scale)
        self._noted = made  # not freed before it is read, on another stream than it was made on

    @torch.inference_mode(False)
    def _make_room(self, form: Form) -> None:
        """FSDP2 has room for what came before, and would reuse it. linear.weight stays, with its gradients."""
        parameter, (n, k) = self._parameter, self._shape
        if self._group._training_state.name == "PRE_BACKWARD":
            raise RuntimeError(
                f"Float8Linear: precision {self.linear.plan.precision.name!r} was set between forward and backward; "
                "needs one for both. Set it between two steps."
            )
        room = torch.empty(self.size().numel() * len(self.ranks), dtype=form.dtype, device=parameter.device)
        parameter.all_gather_outputs = [room]
        whole = room.view(-1, k)[:n]
        self._form, self._arrived = form, whole.view(form.spec.format.dtype) if form.spec else whole
        weight = whole if form == MASTER else torch.full((), float("nan"), device=parameter.device).expand(n, k)
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.data = weight
        else:
            parameter._unsharded_param = nn.Parameter(weight, requires_grad=self.master.requires_grad)
        room.untyped_storage().resize_(0)  # as FSDP2 leaves it, which allocates it on the stream that reads it

    def _wants_any(self) -> bool:
        """Whether anything has to be made before the weight is sent."""
        return self._wanted().spec is not None or bool(self.linear.scaled_by())

    def _stale(self) -> bool:
        """Whether anything is wanted that there is not, in this precision and of the masters as they are."""
        spec, made = self._wanted().spec, self._made
        if not self._wants_any():
            return False
        if made is None or spec not in (None, made.spec):
            return True
        return not all(map(SeenWeight.is_that, made.seen, self._watched()))

    def _scaled_by(self) -> list[GatheredOperand]:
        """Those of the gate and up projection that scale the input."""
        return [one for linear in self.linear.scaled_by() if (one := linear.provider.gathered) is not None]

    def _watched(self) -> list[Tensor]:
        """Tensors whose version counters tell of writes: masters and, each counts its own, this rank's rows of them.

        Not these where a rank has none, for it might see no write where the others do, and they would wait for it.
        """
        watched: list[Tensor] = []
        for one in (self, *self._scaled_by()):
            all_have_some = one.size()[0] * (len(one.ranks) - 1) < one.linear.out_features
            master = one._parameter.sharded_param
            watched += [master, master._local_tensor] if all_have_some else [master]
        return watched

    def _rows(self) -> tuple[Tensor, int]:
        """This rank's rows of the master, and the number of the first."""
        parameter, each, n = self._parameter, self.size()[0], self.linear.out_features
        start = min(parameter.mesh_info.shard_mesh_rank * each, n)
        return parameter._sharded_param_data.view(self.size())[: n - start], start

    def own_sizes(self) -> Tensor:
        """This rank's channel sizes of gate and up, fp64, with zeros to as many as the first rank has."""
        gate, up = self._scaled_by()
        own = channel_size(gate._rows()[0], up._rows()[0])
        return F.pad(own, (0, gate.size()[0] - len(own)))

    def spread_rows(self, channel_scale: Tensor | None) -> SpreadRows | None:
        """This rank's rows of the weight that is rounded; None where no codes are wanted."""
        if (spec := self._wanted().spec) is None:
            return None
        (rows, start), each, backend = self._rows(), self.size()[0], self.linear.plan.backend
        return SpreadRows(
            rows=rows, start=start, each=each, shape=self._shape, spec=spec, backend=backend, divisor=channel_scale
        )

    def keep(self, codes: Tensor | None, scale_inv: Tensor | None, channel_scale: Tensor | None) -> None:
        """Keep what was made, see Made; of codes there may be fewer rows than are sent."""
        if codes is not None:
            data, missing = codes.view(CODES), self.size()[0] - len(codes)
            codes = F.pad(data, (0, 0, 0, missing)) if missing else data.contiguous()
        seen = tuple(SeenWeight(tensor, exchanges=False) for tensor in self._watched())
        self._made = Made(seen, self._wanted().spec, codes, scale_inv, channel_scale)


def _turned(
    data: Tensor, scale_inv: Tensor | None, after: Tensor | None, *, spec: QuantSpec | None, backend: str
) -> Operand:
    """w.T of what came for forward, and has come again."""
    if not torch.compiler.is_compiling() and data.untyped_storage().nbytes() == 0 < data.numel():
        raise RuntimeError(
            "Float8Linear: backward reads a weight that is not gathered as it was for forward; needs the precision of "
            "forward, in a layer that FSDP2 gathers for backward. Set precisions between two steps."
        )
    return Operand(data.t()) if spec is None else transposed(data, scale_inv, after, spec=spec, backend=backend)


def _noted(held: Tensor | None, value: Tensor) -> Tensor:
    """The value where the held one was, if it fits there."""
    if held is None or held.shape != value.shape:
        return value.clone()
    with torch.autograd._unsafe_preserve_version_counter(held):
        return held.copy_(value)


def _make(weights: Sequence[GatheredOperand], group: dist.ProcessGroup) -> None:
    """Make what these weights want before they are sent; every rank must call it, for the same ones."""
    scaled = [weight for weight in weights if weight.linear.scaled_by()]
    sizes = gather_rows([weight.own_sizes() for weight in scaled], group)
    scales = {
        id(weight): scale_of_size(size[: weight.linear.in_features]) for weight, size in zip(scaled, sizes, strict=True)
    }
    matrices = [weight.spread_rows(scales.get(id(weight))) for weight in weights]
    made = iter(quantize_spread([rows for rows in matrices if rows is not None], group))
    for weight, rows in zip(weights, matrices, strict=True):
        codes, scale_inv = (None, None) if rows is None else next(made)
        weight.keep(codes, scale_inv, scales.get(id(weight)))


def element_bytes(model: nn.Module) -> dict[int, int]:
    """By id of a weight, bytes in which gather_operands would have its elements gathered."""
    alone = own_weights(model)
    return {
        id(linear.weight): gathered_form(linear.precision).dtype.itemsize
        for linear in converted_linears(model)
        if id(linear.weight) in alone
    }


def show_weights(linears: Iterable[Float8Linear], shown: bool) -> None:
    """Whether linear.weight is there while its layer computes; on every rank at a time, and between two steps.

    It always is but where `gather_operands` has been.
    """
    for linear in linears:
        if (gathered := linear.provider.gathered) is not None:
            gathered.shown = shown
