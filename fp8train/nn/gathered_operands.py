"""A sharded weight is gathered as what its GEMMs multiply: FP8 codes, a byte an element, or BF16; not the FP32 master.

Each rank rounds its own rows, to FP8 once per optimizer step. FSDP2 asks the rows of a parameter what to send
(fsdp_pre_all_gather), and hands over what has come of all ranks (fsdp_post_all_gather).
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
from fp8train.nn.spread_rows import SpreadRows, quantize_spread
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


class OwnCodes(NamedTuple):
    """What a rank sends of a weight, uint8, with the scales of all of it, and the tensors that it was made of."""

    spec: QuantSpec
    data: Tensor
    scale_inv: Tensor
    seen: tuple[SeenWeight, ...]


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
    """

    def __init__(self, linear: Float8Linear, group: Any, parameter: Any, peers: Sequence[GatheredOperand]) -> None:
        self.linear, self._group, self._parameter, self._peers = linear, group, parameter, peers
        self.ranks = dist.get_process_group_ranks(parameter.mesh_info.shard_process_group)
        self.shown = False  # send the master, for somebody looks at it
        self._form: Form | None = None  # of what was sent last
        self._own: OwnCodes | None = None
        self._arrived = self._scale_inv = self._scale_sent = torch.empty(0)
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
    def held_bytes(self) -> int:
        """Of what this rank keeps from step to step in this precision: codes of its rows, and all scales twice."""
        spec = gathered_form(self.linear.plan.precision).spec
        return 0 if spec is None else self.size().numel() + 2 * 4 * math.prod(spec.scale_shape(*self._shape))

    def forget(self) -> None:
        """The master was written: codes are made anew before they are sent again."""
        self._own = None

    def operands(self) -> tuple[Operand, LaterOperand] | None:
        """w [N, K] for fprop, and what makes w.T [K, N] for dgrad; None where the master has come.

        Raises:
            RuntimeError: the precision was changed while the layer is whole.
        """
        form, plan = self._form, self.linear.plan
        if form is None or form == MASTER:
            return None
        if form != self._wanted():
            raise RuntimeError(
                f"Float8Linear: precision {plan.precision.name!r} was set while its layer is whole, in "
                f"{form.spec or form.dtype}; needs a layer that is sharded. Set it between two steps, after reshard()."
            )
        w = Operand(self._arrived, self._scale_inv if form.spec else None, form.spec)
        return w, LaterOperand(partial(_turned, spec=form.spec, backend=plan.backend), w.tensors())

    def _wanted(self) -> Form:
        return MASTER if self.shown else gathered_form(self.linear.plan.precision)

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
        """((this rank's rows, with zeros to the length of the first rank's,), scales of all rows or None).

        Raises:
            RuntimeError: the precision was changed between forward and backward.
        """
        form = self._wanted()
        if form != self._form:
            self._make_room(form)
        if form.spec is None:
            return (self._parameter._sharded_param_data.view(self.size()).to(form.dtype),), None
        if self._stale():
            _round([peer for peer in self._peers if peer.ranks == self.ranks and peer._stale()], mesh.get_group())
        assert self._own is not None
        return (self._own.data,), self._own.scale_inv

    # FSDP2 inspects it at every gather of every weight, which takes several times as long as the call
    fsdp_pre_all_gather.__signature__ = inspect.signature(fsdp_pre_all_gather)  # type: ignore[attr-defined]

    def fsdp_post_all_gather(
        self, came: Any, scale_inv: Tensor | None, dtype: torch.dtype, *, out: nn.Parameter
    ) -> None:
        """Note the scales of what has come to its room, where they were: autograd sees neither written."""
        if scale_inv is None or scale_inv is self._scale_sent:
            return
        with torch.inference_mode(False), torch.no_grad():  # training will write to what an evaluation has made
            if self._scale_inv.shape == scale_inv.shape:
                with torch.autograd._unsafe_preserve_version_counter(self._scale_inv):
                    self._scale_inv.copy_(scale_inv)
            else:
                self._scale_inv = scale_inv.clone()
        self._scale_sent = scale_inv  # not freed before it is read, on another stream than it was made on

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

    def _stale(self) -> bool:
        """Whether codes are wanted, and there are none in this precision and of the master as it is."""
        spec, own = self._wanted().spec, self._own
        if spec is None or own is None or own.spec != spec:
            return spec is not None
        return not all(map(SeenWeight.is_that, own.seen, self._watched()))

    def _watched(self) -> tuple[Tensor, ...]:
        """Tensors whose version counters tell of writes: the master and, each counts its own, this rank's rows of it.

        Not these where a rank has none, for it might see no write where the others do, and they would wait for it.
        """
        all_have_some = self.size()[0] * (len(self.ranks) - 1) < self.linear.out_features
        master = self._parameter.sharded_param
        return (master, master._local_tensor) if all_have_some else (master,)

    def rows(self) -> SpreadRows:
        """This rank's rows of the master."""
        parameter, plan = self._parameter, self.linear.plan
        each, (n, k) = self.size()[0], self._shape
        start = min(parameter.mesh_info.shard_mesh_rank * each, n)
        assert plan.precision.fprop.right is not None
        return SpreadRows(
            rows=parameter._sharded_param_data.view(self.size())[: n - start], start=start, each=each, shape=(n, k),
            spec=plan.precision.fprop.right, backend=plan.backend,
        )  # fmt: skip

    def keep(self, rows: SpreadRows, codes: Tensor, scale_inv: Tensor) -> None:
        """Keep codes of this rank's rows, and the scales of the whole weight."""
        data, missing = codes.view(torch.uint8), rows.each - len(codes)
        padded = F.pad(data, (0, 0, 0, missing)) if missing else data.contiguous()
        seen = tuple(SeenWeight(tensor, exchanges=False) for tensor in self._watched())
        self._own = OwnCodes(rows.spec, padded, scale_inv, seen)


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


def _round(weights: Sequence[GatheredOperand], group: dist.ProcessGroup) -> None:
    """Make the codes of these weights; every rank must call it, for the same ones."""
    matrices = [weight.rows() for weight in weights]
    for weight, rows, made in zip(weights, matrices, quantize_spread(matrices, group), strict=True):
        weight.keep(rows, *made)


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
