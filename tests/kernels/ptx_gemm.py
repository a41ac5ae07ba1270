"""Launches of the GEMM entries on a CPU by their PTX for sm_90 (ptx_warps.py), against the definition.

python -m tests.kernels.ptx_gemm               a line for each case: right, or what is wrong
python -m tests.kernels.ptx_gemm gemm_wgrad    the same of one operation
python -m tests.kernels.ptx_gemm --altered     the same of kernels with one instruction altered, which none may bear
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8train.kernels import gemm, gemm_gluon_launch, gemm_launch, gemm_wgrad
from tests.kernels import ptx_tensor, ptx_warps
from tests.kernels.gluon_faults import EARLY_AHEAD, faulty_modules
from tests.kernels.products import assert_product, m_contiguous, padded_rows, quantized
from tests.kernels.ptx_instructions import launch_of
from tests.kernels.ptx_machine import BASE, Fault, Memory
from tests.kernels.ptx_run import FILL, Launcher, argument, behind_rows
from tests.shapes import matrix

SCRATCH = 1 << 50  # address of the memory in which a kernel makes tensor maps


class GemmLauncher(Launcher):
    """Launches whose warps run on their own; `seed` says in which order."""

    seed = 0

    def __init__(self) -> None:
        super().__init__()
        gemm_launch.first_launch = gemm_gluon_launch.first_launch = self.launch
        gemm_launch.capability = lambda device: (9, 0)

    def execute(self, compiled: Any, grid: int, passed: list[Any], memory: Memory) -> None:
        """As Launcher's, with descriptors made of what Triton tells the driver of them."""
        if "wgmma" not in self.ptx:
            return super().execute(compiled, grid, passed, memory)
        facts, descriptors = iter(compiled.metadata.tensordesc_meta or ()), {}
        for number, x in enumerate(passed):
            if hasattr(x, "block_shape"):
                fact, place = next(facts), x.base.untyped_storage().data_ptr()
                size = x.base.element_size()
                descriptors[number] = ptx_warps.Descriptor(
                    address=BASE + memory.place[place] + x.base.data_ptr() - place,
                    sizes=tuple(x.shape[::-1]),
                    strides=tuple(stride * size for stride in x.strides[-2::-1]),
                    box=tuple(fact["block_size"][::-1]),
                    size=fact["elem_size"],
                    swizzle=fact["swizzle"],
                )
        values = [0 if number in descriptors else argument(x, memory) for number, x in enumerate(passed)]
        ptx = self.alter.get(self.ptx, self.ptx)
        launch = launch_of(ptx, compiled.metadata.shared, grid, [*values, SCRATCH, 0], memory, ptx_tensor.action)
        ptx_warps.run(launch, ptx, descriptors, self.seed)
        return None


class Case(NamedTuple):
    """An entry and a product; wgrad adds to what is there."""

    operation: str
    entry: str
    shape: tuple[int, int, int]  # M, N, K
    out: torch.dtype
    bias: bool = False
    step: int = 16  # rows of codes start at multiples of so many bytes


def wrong(launcher: Launcher, case: Case) -> str:
    """What is wrong with the result, or right."""
    M, N, K = case.shape
    wgrad = case.operation == "gemm_wgrad"
    a, b = quantized(M, K, "e4m3 1x128", 1), quantized(N, K, "e4m3 1x128" if wgrad else "e4m3 128x128", 2)
    wide = torch.empty(M, N + 16, dtype=case.out)[:, :N]
    before: Tensor | None = None
    options: dict[str, Any] = {}
    if wgrad:
        wide.copy_(matrix(M, N))
        before, options = wide.clone(), {"accumulate": True}
    elif case.bias:
        before = torch.linspace(-3, 3, N)
        options = {"bias": before}
    launcher.results.clear()
    launcher.results.add(wide.untyped_storage().data_ptr())
    codes = [padded_rows(x.qdata, case.step) for x in (a, b)]
    scale = m_contiguous(b.scale_inv) if wgrad else b.scale_inv
    function = getattr(gemm_wgrad if wgrad else gemm, case.operation)
    try:
        y = function(*codes, m_contiguous(a.scale_inv), scale, config=case.entry, out=wide, **options)
        assert_product(y, a, b, before)
    except Fault as fault:
        return str(fault)
    except AssertionError:
        return "the product differs"
    return "something else is written beside it" if (behind_rows(y) != FILL).any() else "right"


def cases() -> Iterator[Case]:
    """Several tiles and more blocks than slots for each program of the persistent entries; edges in all dimensions."""
    for operation, module in (("gemm", gemm), ("gemm_wgrad", gemm_wgrad)):
        for entry in module.CONFIGS:
            shape = (141, 150, 528) if entry.startswith("pointer") else (300, 272, 528)
            if operation == "gemm_wgrad":
                yield Case(operation, entry, shape, torch.float32)
                continue
            yield Case(operation, entry, shape, torch.bfloat16)
            yield Case(operation, entry, shape, torch.float32, bias=True)
        yield Case(operation, "pointer_64x64_s3", (70, 85, 333), torch.float32, step=1)


def dropped(line: str) -> str:
    """The line without its instruction."""
    return ""


def changed(number: int, to: int) -> Callable[[str], str]:
    """Puts another number in a line."""
    return lambda line: re.sub(rf"\b{number}\b", str(to), line)


ROWS = 4611686293305294848  # what a tensor core is told of an operand: 1024 bytes from eight rows to the next, swizzled
FPROP = Case("gemm", "gluon_192x128_s4", (200, 272, 400), torch.bfloat16)  # two tiles and eight blocks to a program
WGRAD = Case("gemm_wgrad", "gluon_192x128_ahead_s5", (200, 272, 400), torch.float32)
# product, instruction, how a line that has it is altered, and which of the lines: those of the first warpgroup, mostly
ALTERED: tuple[tuple[Case, str, Callable[[str], str], slice], ...] = (
    (FPROP, "bar.sync", dropped, slice(3)),
    (FPROP, "barrier.sync", dropped, slice(1)),
    (FPROP, "fence.proxy.async", dropped, slice(1, 2)),  # the first is that of the mbarriers: ptx_tensor._barrier_at
    (FPROP, "mbarrier.arrive.shared", dropped, slice(1)),
    (FPROP, "mbarrier.try_wait", dropped, slice(None, None, 3)),  # of a warpgroup and of the producer
    (FPROP, "wgmma.wait_group", dropped, slice(1)),
    (FPROP, "wgmma.fence", dropped, slice(1)),
    (FPROP, "cp.async.bulk.wait_group", dropped, slice(2)),
    (FPROP, "mbarrier.init", changed(3, 2), slice(1)),
    (FPROP, "expect_tx", changed(40960, 32768), slice(1)),
    (FPROP, "xor.b32", changed(32, 48), slice(1)),
    (FPROP, "or.b64", changed(ROWS, ROWS - (32 << 32)), slice(2)),
    (WGRAD, "bar.sync", dropped, slice(1)),
    (WGRAD, "mbarrier.arrive.shared", dropped, slice(1)),
    (WGRAD, "mbarrier.try_wait", dropped, slice(2)),
    (WGRAD, "wgmma.wait_group", dropped, slice(1)),
    (WGRAD, "red.global", dropped, slice(1)),
)


def altered(launcher: GemmLauncher) -> Iterator[tuple[str, str]]:
    """What was altered, and what came of it."""
    for case, changes in itertools.groupby(ALTERED, lambda row: row[0]):
        launcher.alter = {}
        assert wrong(launcher, case) == "right"
        ptx = launcher.ptx
        lines = ptx.split("\n")
        for _, instruction, change, which in changes:
            places = [at for at, line in enumerate(lines) if instruction in line and change(line) != line]
            for at in places[which]:
                launcher.alter = {ptx: "\n".join([*lines[:at], change(lines[at]), *lines[at + 1 :]])}
                yield f"{case.entry}, {instruction} of line {at} altered", wrong(launcher, case)
    launcher.alter = {}
    with tempfile.TemporaryDirectory() as folder:
        _, gemm_gluon_launch.gemm_gluon = faulty_modules(Path(folder), *EARLY_AHEAD)
        yield "slots are given back while their scales may be on their way", wrong(launcher, WGRAD)


def main(argv: list[str]) -> int:
    """Print the lines; 1 if one of them is not as it should be."""
    launcher, failed = GemmLauncher(), False
    found: Iterable[tuple[str, str]] = altered(launcher)
    if argv != ["--altered"]:
        asked = (case for case in cases() if not argv or case.operation in argv)
        found = ((f"{case.operation} {case.entry} {case.shape} {case.out}", wrong(launcher, case)) for case in asked)
    for label, what in found:
        sys.stdout.write(f"{label}: {what}\n")
        failed |= (what == "right") == (argv == ["--altered"])
    return int(failed)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main(sys.argv[1:]))
