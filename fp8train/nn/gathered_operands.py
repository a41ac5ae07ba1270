"""A sharded weight is gathered as what its GEMMs multiply: FP8 codes, a byte an element, or BF16; not the FP32 master.

Each rank rounds its own rows, FP8 once per optimizer step. Where ranks share a block, its amax is the largest of theirs:
the codes are those of the whole weight, however its rows are spread. FSDP2 asks the rows of a parameter what to send
(fsdp_pre_all_gather), and hands over what came (fsdp_post_all_gather).
Source: torch, "FSDP2 all-gather extensions" (fully_shard); float8 all-gather of torchao, there with a scale per tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fp8train.backends import get_backend
from fp8train.errors import ConfigError
from fp8train.nn.operands import LaterOperand, Operand, transposed
from fp8train.nn.weights import own_weights
from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.quant.reference import encode, from_blocks, to_blocks
from fp8train.quant.scaling import amax_bits, scale_inv_from_amax

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from fp8train.nn.linear import Float8Linear

CODES, BF16, MASTER = "codes", "bf16", "master"
ELEMENT_BYTES = {CODES: 1, BF16: 2, MASTER: 4}


def gathered_form(precision: LinearPrecision) -> str:
    """CODES where w.T has the codes of w, BF16 where neither is rounded further, else MASTER."""
    fprop, dgrad = precision.fprop.right, precision.dgrad.right
    if fprop is not None:
        return CODES if fprop == dgrad and fprop.transposable else MASTER
    return BF16 if dgrad is None and precision.high is torch.bfloat16 and not precision.noise else MASTER


class GatheredOperand:
    """What a linear's weight [N, K] is gathered as, this rank's rows of that, and what has come of all ranks.

    While its layer computes, linear.weight is NaN, of the master's shape, unless the master was gathered: it is there
    for its gradient, FP32 [N, K].

    Args:
        linear: its provider asks for `operands`.
        parameter: FSDP2's record of the weight.
        peers: all of the model, this one too: they are rounded together.
    """

    def __init__(self, linear: Float8Linear, parameter: Any, peers: list[GatheredOperand]) -> None:
        self._linear, self._parameter, self._peers = linear, parameter, peers
        self.shown = False  # gather the master, for somebody looks at it; on every rank, or on none
        self._form = ""  # of what was gathered last
        self._codes: tuple[QuantSpec, Tensor] | None = None  # of this rank's rows; None: to be made
        self._arrived = self._scale_inv = torch.empty(0)
        rows = parameter._sharded_local_tensor
        rows.fsdp_pre_all_gather, rows.fsdp_post_all_gather = self._send, self._take
        parameter._init_extensions()

    @property
    def held_bytes(self) -> int:
        """Of this rank from step to step."""
        return 0 if self._codes is None else self._codes[1].numel()

    def forget(self) -> None:
        """The master has changed: codes are made anew before they are gathered the next time."""
        self._codes = None

    def operands(self) -> tuple[Operand, Operand | LaterOperand] | None:
        """w [N, K] for fprop, and w.T [K, N] for dgrad or what makes it; None where they are to be made of the master.

        Raises:
            RuntimeError: the precision was changed while the layer is whole.
        """
        plan = self._linear.plan
        if self._form != self._wanted():
            raise RuntimeError(
                f"Float8Linear: precision {plan.precision.name!r} was set while its layer is gathered as {self._form}; "
                "needs a layer that is sharded. Change it between two steps."
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
        return MASTER if self.shown else gathered_form(self._linear.plan.precision)

    def _send(self, mesh: DeviceMesh, size: torch.Size, stride: Any, module: nn.Module, policy: Any) -> Any:
        """This rank's rows of what is gathered, with zeros to the length of the first rank's."""
        form, parameter = self._wanted(), self._parameter
        if form != self._form:  # FSDP2 keeps room for what came first
            parameter.all_gather_outputs = []
            vars(parameter).pop("_unsharded_param", None)
            self._form = form
        if form == CODES:
            if self._stale():
                _round([peer for peer in self._peers if peer._stale()], mesh.get_group())
            assert self._codes is not None
            return (self._codes[1],), None
        rows = parameter._sharded_local_tensor.detach()
        return (self._padded(rows.to(torch.bfloat16) if form == BF16 else rows),), None

    def _take(self, arrived: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        """Keep what came; the first time also give what FSDP2 makes linear.weight of."""
        if out is not None:  # what came is in the memory of before
            return None
        (whole,) = arrived
        if self._form == MASTER:
            return whole, ()
        whole = whole[: self._linear.out_features]
        if self._form == CODES:
            assert self._codes is not None
            whole = whole.view(self._codes[0].format.dtype)
        self._arrived = whole
        return whole.new_empty(0, dtype=dtype).as_subclass(_Unread), ()

    def _stale(self) -> bool:
        spec = self._linear.plan.precision.fprop.right
        return self._wanted() == CODES and (self._codes is None or self._codes[0] != spec)

    def _padded(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, self._parameter.padded_sharded_param_size[0] - rows.shape[0]))

    # rounding, in two steps: what each rank knows of the scales, and once all of it is known the codes

    def scale_bits(self, rank: int) -> Tensor:
        """int32 [row blocks, column blocks], what this rank's rows say of the scales; 0 where it has none.

        Where no block is cut, bits of scale_inv, and the codes are made; else those of amax.
        """
        spec, rows = self._linear.plan.precision.fprop.right, self._parameter._sharded_local_tensor.detach()
        assert spec is not None
        each, (n, k) = self._parameter.padded_sharded_param_size[0], self._parameter._orig_size
        table = torch.zeros(spec.scale_shape(n, k), dtype=torch.int32, device=rows.device)
        height = spec.block_shape(n, k)[0]
        self._start = rank * each
        self._cut = each % height != 0 and each < n
        if rows.numel() == 0:
            codes, bits = rows, table[:0]
        elif self._cut:
            codes, bits = rows, amax_bits(self._blocks(rows, spec)[0], dim=(-3, -1))
        else:
            q, _ = get_backend(self._linear.plan.backend).quantize_square(rows, spec, None, False)
            codes, bits = q.qdata, q.scale_inv.view(torch.int32)
        first = min(self._start, n) // height
        table[first : first + bits.shape[0]] = bits
        self._codes = spec, codes
        return table

    def finish(self, bits: Tensor) -> None:
        """Take in the bits of all ranks, and make the codes where that took them."""
        assert self._codes is not None
        spec, codes = self._codes
        scale_inv = scale_inv_from_amax(bits, spec.format, spec.scale) if self._cut else bits.view(torch.float32)
        if self._scale_inv.shape == scale_inv.shape:
            self._scale_inv.copy_(scale_inv)  # a compiled graph keeps its address
        else:
            self._scale_inv = scale_inv.clone()
        if self._cut and codes.numel():
            codes = self._encoded(codes, scale_inv, spec)
        self._codes = spec, self._padded(codes.view(torch.uint8))

    def _encoded(self, rows: Tensor, scale_inv: Tensor, spec: QuantSpec) -> Tensor:
        """reference.quantize, with the scales given."""
        blocks, sizes = self._blocks(rows, spec)
        first = self._start // spec.block_shape(*self._parameter._orig_size)[0]
        own = scale_inv[first : first + blocks.shape[0], None, :, None]
        codes = encode(blocks * (torch.ones_like(own) / own), spec)
        codes = torch.where(own.isnan(), torch.full_like(codes, spec.format.nan_code), codes)
        return from_blocks(codes, sizes)[self._above(spec) :]

    def _blocks(self, rows: Tensor, spec: QuantSpec) -> tuple[Tensor, tuple[int, int]]:
        """to_blocks of these rows in the grid of the whole weight: below zeros for rows of ranks before this one."""
        return to_blocks(F.pad(rows.to(torch.float32), (0, 0, self._above(spec), 0)), spec)

    def _above(self, spec: QuantSpec) -> int:
        """Rows of this rank's first block that ranks before it have."""
        return 0 if isinstance(spec.block, str) else self._start % spec.block[0]


@torch.no_grad()
def _round(weights: Sequence[GatheredOperand], group: dist.ProcessGroup) -> None:
    """Make the codes of weights anew; every rank of the group must call it, for the same ones."""
    rank = dist.get_rank(group)
    tables = [weight.scale_bits(rank) for weight in weights]
    bits = torch.cat([table.flatten() for table in tables])
    dist.all_reduce(bits, dist.ReduceOp.MAX, group)
    for weight, table, own in zip(weights, tables, bits.split([table.numel() for table in tables]), strict=True):
        weight.finish(own.view_as(table))


class _Unread(Tensor):
    """What FSDP2 makes an unsharded parameter of by as_strided: a NaN in the shape that it asks for."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.as_strided:
            with torch._C.DisableTorchFunctionSubclass():
                return torch.full((), float("nan"), dtype=args[0].dtype, device=args[0].device).expand(args[1])
        return super().__torch_function__(func, types, args, kwargs or {})


def gather_operands(model: nn.Module, layers: nn.Module) -> None:
    """From now on the weights of a sharded model's layers are gathered as what their GEMMs multiply.

    Left alone are weights that another module holds too, and linears outside of `layers`.

    Args:
        model: converted, prepared by gather_weights and sharded by FSDP2.
        layers: the modules in it that are gathered one after another, and freed after forward.

    Raises:
        ConfigError: this torch's FSDP2 has other parts.
    """
    from fp8train.nn.linear import Float8Linear

    alone, peers = own_weights(model), []
    inside = {id(module) for module in layers.modules() if isinstance(module, Float8Linear)}
    try:
        for parameter in _fsdp_parameters(model):
            owner = parameter._module_info
            linear = owner.module
            if owner.param_name == "weight" and id(linear) in inside and id(linear.weight) in alone:
                peers.append(GatheredOperand(linear, parameter, peers))
                linear.provider.gathered = peers[-1]
    except AttributeError as error:
        raise ConfigError(
            f"parallel.gather: got operands with torch {torch.__version__}, whose FSDP2 has other parts ({error}); "
            "needs torch 2.11 to 2.13. Set parallel.gather=fp32."
        ) from error


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
