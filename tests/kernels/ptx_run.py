"""Launches of the kernels on a CPU by their PTX for sm_90 (ptx_machine.py), GEMMs left out, against the definition.

python -m tests.kernels.ptx_run             a line for each case: right, or what is wrong
python -m tests.kernels.ptx_run --altered   the same of kernels with one instruction altered, which none may bear
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fp8train.backends.producer_checks import norm_input, rstd_is_off, swiglu_inputs, wrong_norm_gradient
from fp8train.models.attention import apply_rope
from fp8train.quant.formats import E4M3, E5M2, Format, QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import quantize
from tests.kernels import sm90
from tests.kernels.ptx_instructions import launch_of
from tests.kernels.ptx_machine import BASE, Array, Fault, Memory
from tests.quant.specs import same_codes
from tests.shapes import matrix

B, F = torch.bfloat16, torch.float32
TYPES = {B: "*bf16", F: "*fp32", E4M3.dtype: "*fp8e4nv", E5M2.dtype: "*fp8e5", torch.uint8: "*u8"}
FILL = 0xA5  # every byte of a result before a kernel writes it
EPS = 1e-5


class Launcher:
    """In the place of fp8train.kernels.launch.first_launch; what torch.empty gives is filled with FILL."""

    def __init__(self) -> None:
        from fp8train.kernels import launch

        self.ptx = ""  # of the last launch
        self.alter: dict[str, str] = {}  # PTX -> what to execute in its place
        self.results: set[int] = set()  # storages made since the last launch
        launch.first_launch = self.launch
        torch.empty, torch.empty_like = self.filled(torch.empty), self.filled(torch.empty_like)

    def filled(self, empty: Callable[..., Tensor]) -> Any:
        """The function, its memory filled."""

        def made(*arguments: Any, **options: Any) -> Tensor:
            x = empty(*arguments, **options)
            storage(x)[:] = FILL
            self.results.add(x.untyped_storage().data_ptr())
            return x

        return made

    def launch(
        self, key: Hashable, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any],
        tensors: Mapping[str, int], device: torch.device, **options: Any,
    ) -> None:  # fmt: skip
        """Compile as such a launch would, and execute. Raises Fault."""
        signature, constants, odd, passed = {}, {}, [], []
        for parameter in kernel.params:
            name, value = parameter.name, arguments[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
                constants[name] = value
                continue
            signature[name] = type_of(value)
            place = value.data_ptr() if isinstance(value, Tensor) else value
            odd += [name] if isinstance(place, int) and (place % 16 or not special) else []
            passed += [value, *value.shape, *value.strides] if hasattr(value, "block_shape") else [value]
        options |= {"odd": odd, "gluon": hasattr(kernel, "is_gluon") and kernel.is_gluon()}
        compiled = sm90.compiled(("", kernel, signature, constants, options))
        self.ptx = compiled.asm["ptx"]
        tensors = [getattr(x, "base", x) for x in passed]  # of a descriptor, what it describes
        storages = {x.untyped_storage().data_ptr(): storage(x) for x in tensors if isinstance(x, Tensor)}
        memory = Memory(storages)
        self.execute(compiled, grid[0], passed, memory)
        for place, data in storages.items():
            after, written = memory.result(place, data.size)
            if place in self.results:
                data[:] = after
            elif written.any():
                raise Fault(f"{kernel.fn.__name__} writes what it reads")
        self.results.clear()

    def execute(self, compiled: Any, grid: int, passed: list[Any], memory: Memory) -> None:
        """Run what was compiled with these arguments. Raises Fault."""
        values = [argument(x, memory) for x in passed] + [0, 0]  # Triton's scratch memory, of which there is none
        launch_of(self.alter.get(self.ptx, self.ptx), compiled.metadata.shared, grid, values, memory).run()


def type_of(value: Any) -> str:
    """What Triton calls the type of an argument."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if hasattr(value, "block_shape"):
        kind = TYPES[value.base.dtype].removeprefix("*")
        return f"tensordesc<{kind}{value.block_shape},{value.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


def storage(x: Tensor) -> Array:
    """All bytes of its storage."""
    bytes_ = x.untyped_storage()
    return np.frombuffer((ctypes.c_ubyte * bytes_.nbytes()).from_address(bytes_.data_ptr()), np.uint8)


def argument(x: Tensor | float, memory: Memory) -> int:
    """What the kernel is given: an address, the bits of an FP32 number, or an integer."""
    if isinstance(x, Tensor):
        place = x.untyped_storage().data_ptr()
        return BASE + memory.place[place] + x.data_ptr() - place
    return int(np.float32(x).view(np.uint32)) if isinstance(x, float) else x


def behind_rows(x: Tensor) -> Tensor:
    """Bytes between the end of a row and the begin of the next."""
    x = x if x.stride(-1) == 1 else x.T
    return x.as_strided((x.shape[0], x.stride(0)), (x.stride(0), 1))[:, x.shape[1] :].view(torch.uint8)


def wrong_copy(
    label: str, made: tuple[Tensor, Tensor], x: Tensor, spec: QuantSpec, transpose: bool = False
) -> list[str]:
    """Codes and scales that are not the definition's, and what was written beside them."""
    found = [] if same_codes(QTensor(*made, spec), quantize(x, spec, transpose=transpose)) else [f"{label} differ"]
    padding = 0 if transpose else FILL  # a GEMM reads the columns that fill up the last block of 128
    beside = (behind_rows(made[0]) != padding).any() or (behind_rows(made[1]) != FILL).any()
    return found + ([f"{label}: something else is written beside them"] if beside else [])


def wrong_copies(made: tuple[Tensor, ...], x: Tensor, spec: QuantSpec) -> list[str]:
    """Of a row copy and a column copy, each with its scales."""
    return wrong_copy("rows", made[:2], x, spec) + wrong_copy("columns", made[2:], x, spec, True)


def settings(scale: str, fmt: Format = E4M3, block: tuple[int, int] = (1, 128)) -> tuple[QuantSpec, dict[str, Any]]:
    """A specification, and what the launchers call it."""
    return QuantSpec(fmt, block, scale), {"fp8_dtype": fmt.dtype, "pow2": scale == "pow2"}


def quantiser(shape: tuple[int, int], dtype: torch.dtype, scale: str) -> list[str]:
    """quantize_dual."""
    from fp8train.kernels.quantize import quantize_dual

    x, (spec, options) = matrix(*shape, dtype=dtype), settings(scale)
    x[3, 1], x[5, 7], x[6] = float("inf"), float("nan"), 0.0
    return wrong_copies(quantize_dual(x, **options), x, spec)


def row_quantiser(shape: tuple[int, int], dtype: torch.dtype, scale: str) -> list[str]:
    """quantize_rows and quantize_columns, to E5M2."""
    from fp8train.kernels.quantize import quantize_columns, quantize_rows

    x, (spec, options) = matrix(*shape, dtype=dtype), settings(scale, E5M2)
    return wrong_copies(quantize_rows(x, **options) + quantize_columns(x, **options), x, spec)


def weight(shape: tuple[int, int], dtype: torch.dtype, scale: str) -> list[str]:
    """quantize_weight, and transpose_codes of what it made."""
    from fp8train.kernels.quantize_weight import quantize_weight
    from fp8train.kernels.transpose_codes import transpose_codes

    w, (spec, options) = matrix(*shape, dtype=dtype), settings(scale, block=(128, 128))
    made = quantize_weight(w, **options)
    found = [] if same_codes(QTensor(*made[:2], spec), quantize(w, spec)) else ["codes differ"]
    for label, turned in (("transposed", made[2:]), ("transpose_codes", transpose_codes(*made[:2]))):
        found += [] if same_codes(QTensor(*turned, spec), quantize(w, spec, transpose=True)) else [f"{label} differ"]
    return found


def swiglu(shape: tuple[int, int], dtype: torch.dtype, scale: str) -> list[str]:
    """swiglu_quantize."""
    from fp8train.kernels import swiglu_quantize as kernels

    (_, gate, up), (spec, options) = swiglu_inputs(shape, dtype, "cpu"), settings(scale)
    return wrong_copies(kernels.swiglu_quantize(gate, up, **options), kernels.swiglu(gate, up), spec)


def swiglu_backward(shape: tuple[int, int], dtype: torch.dtype, scale: str) -> list[str]:
    """swiglu_backward_quantize, with the column copy of h."""
    from fp8train.kernels import swiglu_backward_quantize as kernels
    from fp8train.kernels.swiglu_quantize import swiglu

    (dh, gate, up), (spec, options) = swiglu_inputs(shape, dtype, "cpu"), settings(scale)
    dh[0, 5], up[1, 9], dh[2], gate[3, 1] = float("inf"), float("nan"), 0.0, -float("inf")
    *made, h = kernels.swiglu_backward_quantize(dh, gate, up, h=tuple(options.values()), **options)
    found = [
        f"{label} {fault}"
        for label, copies, x in zip(("dgate", "dup"), made, kernels.swiglu_backward(dh, gate, up), strict=True)
        for fault in wrong_copies(copies, x, spec)
    ]
    return found + wrong_copy("h", h, swiglu(gate, up), spec, True)


def norm(shape: tuple[int, int], dtype: torch.dtype, scale: str) -> list[str]:
    """add_rstd and rmsnorm_quantize."""
    from fp8train.kernels.rmsnorm_quantize import rmsnorm, rmsnorm_quantize
    from fp8train.kernels.rmsnorm_rstd import add_rstd

    x, w, (spec, options) = norm_input(shape, dtype, "cpu"), torch.linspace(0.5, 1.5, shape[1]), settings(scale)
    total, rstd = add_rstd(x, x.flip(0), eps=EPS)
    found = [] if torch.equal(total, x + x.flip(0)) else ["the sum differs"]
    found += ["rstd is off"] if rstd_is_off(rstd, total) else []
    return found + wrong_copies(rmsnorm_quantize(total, w, rstd, **options), rmsnorm(total, w, rstd), spec)


def norm_backward(shape: tuple[int, int], dtype: torch.dtype, scale: str) -> list[str]:
    """rmsnorm_backward, with the stream's own gradient."""
    from fp8train.kernels.rmsnorm_backward import rmsnorm_backward

    dy, x, dtotal = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3))
    arguments = dy.to(B), x, torch.linspace(0.5, 1.5, shape[1]), (x.double().square().mean(1) + EPS).rsqrt().float()
    made = rmsnorm_backward(*arguments, dtotal=dtotal, branch_dtype=B)
    wrong = wrong_norm_gradient(made, *arguments, dtotal)
    return [wrong] if wrong else []


def rotation(shape: tuple[int, int], dtype: torch.dtype, scale: str) -> list[str]:
    """rope of two heads, and its gradient; shape: T and head_dim."""
    from fp8train.kernels.rope import rope

    x, dy = (matrix(2 * shape[0], shape[1], seed=seed, dtype=dtype).view(1, 2, *shape) for seed in (0, 1))
    angles = torch.arange(shape[0]).float().outer(torch.logspace(0, -3, shape[1] // 2))
    tables, variable = (angles.cos(), angles.sin()), x.clone().requires_grad_()
    wanted = apply_rope(variable, *tables, dtype)
    wanted.backward(dy)
    found = [] if torch.equal(rope(x, *tables, out_dtype=dtype), wanted) else ["rotation differs"]
    back = torch.equal(rope(dy, *tables, out_dtype=dtype, inverse=True), variable.grad)
    return found if back else [*found, "gradient differs"]


# check, shape, dtype of what is read, kind of the scales
Case = tuple[Callable[[tuple[int, int], torch.dtype, str], list[str]], tuple[int, int], torch.dtype, str]
CASES: tuple[Case, ...] = (
    (quantiser, (128, 256), B, "pow2"), (quantiser, (128, 256), F, "fp32"), (quantiser, (141, 150), B, "pow2"),
    (row_quantiser, (141, 150), B, "fp32"),
    (weight, (256, 384), F, "pow2"), (weight, (141, 150), B, "fp32"),
    (swiglu, (128, 256), B, "pow2"), (swiglu, (141, 150), B, "pow2"),
    (swiglu_backward, (128, 256), B, "pow2"), (swiglu_backward, (141, 150), B, "fp32"),
    (norm, (128, 256), B, "pow2"), (norm, (141, 150), F, "fp32"),
    (norm_backward, (16, 1024), F, ""), (norm_backward, (5, 150), B, ""),
    (rotation, (64, 128), B, ""), (rotation, (33, 80), F, ""),
)  # fmt: skip
# instruction, and how a line that has it is altered
ALTERED: dict[str, Callable[[str], str]] = {
    "bar.sync": lambda line: "",
    "prmt.b32": lambda line: re.sub("0x([0-9a-fA-F]+)U?;", lambda found: f"{int(found[1], 16) ^ 1:#x};", line),
    "shfl.sync.bfly": lambda line: re.sub(r", \d+, 31", ", 0, 31", line),  # a lane's own number
}
MOST = 4  # lines of an instruction that are altered, one at a time


def outcome(case: Case) -> str:
    """What is wrong with it, or right."""
    check, shape, dtype, scale = case
    try:
        return "; ".join(check(shape, dtype, scale)) or "right"
    except Fault as fault:
        return str(fault)


def altered(launcher: Launcher, case: Case) -> Iterator[tuple[str, str]]:
    """Lines of the case's last kernel, and what came of it when each was altered."""
    assert outcome(case) == "right"
    ptx = launcher.ptx
    lines = ptx.split("\n")
    for instruction, change in ALTERED.items():
        places = [at for at, line in enumerate(lines) if instruction in line and change(line) != line]
        for at in places[:: -(-len(places) // MOST) or 1]:
            other = "\n".join([*lines[:at], change(lines[at]), *lines[at + 1 :]])
            launcher.alter = {ptx: other}
            yield f"{case[0].__name__}, {instruction} of line {at} altered", outcome(case)
    launcher.alter = {}


def main(argv: list[str]) -> int:
    """Print the lines; 1 if one of them is not as it should be."""
    launcher, failed = Launcher(), False
    found: Iterable[tuple[str, str]]
    if argv == ["--altered"]:
        found = (line for check in (quantiser, weight) for line in altered(launcher, (check, (128, 256), B, "pow2")))
    else:
        found = (
            (f"{check.__name__} {shape} {dtype} {scale}", outcome((check, shape, dtype, scale)))
            for check, shape, dtype, scale in CASES
        )
    for label, what in found:
        sys.stdout.write(f"{label}: {what}\n")
        failed |= (what == "right") == bool(argv)
    return int(failed)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main(sys.argv[1:]))
