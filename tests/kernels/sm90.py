"""Machine code of the kernels without a GPU: compile every COMPILE_CASES for sm_90, read what came out, write it down.

python -m tests.kernels.sm90 --check    every case compiles, without spills, with the instructions it must have
python -m tests.kernels.sm90 --write    the same, and the table in kernels/README.md is written anew
python -m tests.kernels.sm90 --json     the figures, for test_compile_sm90.py
python -m tests.kernels.sm90 --others   the plain GEMMs compile to FP8 tensor-core instructions for sm_89 and sm_100
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
BEGIN = "<!-- compiled figures: written by `python -m tests.kernels.sm90 --write` -->"
END = "<!-- end of compiled figures -->"
COLUMNS = (
    "kernel and entry|registers|of math warps|spilled bytes|shared KiB|FP8 MMA|promotion FMA|instructions per K block|"
    "between two MMA"
)

# swiglu_quantize.sigmoid, where ftz loses nothing
SIGMOID = r"ex2\.approx\.ftz\.f32 t, \S+; add\.rn\.f32 t, t, 0f3E800000; rcp\.approx\.ftz\.f32 \S+, t;"


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What the assembler made of one case. Instructions are those of the innermost loop with tensor-core ones."""

    name: str
    registers: int
    math_registers: int  # after setmaxnreg; 0 where warps are not specialised
    spilled_bytes: int
    shared_bytes: int
    fp8_mma: int  # this and the next two per math thread and K block
    promotion_fma: int
    loop_instructions: int
    idle_instructions: int  # of those, what stands between the end of a multiplication and the start of the next
    expected_fma: int  # accumulators per thread: each is promoted once per K block
    flushes: bool  # some instruction flushes subnormal numbers to zero
    warnings: list[str]
    ring: list[str]  # what is wrong with the barriers of a kernel whose warps are specialised by hand

    def row(self) -> str:
        """A line of the table."""
        shared = f"{self.shared_bytes / 1024:.0f}"
        cells = [self.name, self.registers, self.math_registers or "-", self.spilled_bytes, shared]
        cells += [self.fp8_mma, self.promotion_fma, self.loop_instructions] if self.fp8_mma else ["-"] * 3
        cells.append(self.idle_instructions or "-")
        return "| " + " | ".join(map(str, cells)) + " |"

    def faults(self) -> list[str]:
        """What must not be, in words; [] where all is well."""
        found = [f"{self.spilled_bytes} bytes spilled"] if self.spilled_bytes else []
        found += ["flushes subnormal numbers"] if self.flushes else []
        found += [f"assembler: {line}" for line in self.warnings] + self.ring
        if self.expected_fma:
            found += [] if self.fp8_mma >= 4 else [f"{self.fp8_mma} FP8 tensor-core instructions per K block; needs 4"]
            if self.promotion_fma != self.expected_fma:
                found.append(f"{self.promotion_fma} promotion FMAs per thread and K block; needs {self.expected_fma}")
        return found


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """COMPILE_CASES of all kernel files that have some, and the Gluon entries of the GEMMs."""
    from tests.kernels import gluon_cases

    found = []
    for path in sorted(README.parent.glob("*.py")):
        module = importlib.import_module(f"fp8train.kernels.{path.stem}")
        found += getattr(module, "COMPILE_CASES", [])
        found += gluon_cases.compile_cases(path.stem, getattr(module, "CONFIGS", {}))
    return found


def compiled(case: tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]], capability: int = 90) -> Any:
    """Compile one case as a launch with such arguments would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, signature, constants, options = case
    options = dict(options)
    odd, source = options.pop("odd", ()), ASTSource
    if options.pop("gluon", False):
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    types = {name: "constexpr" if name in constants else signature.get(name) for name in kernel.arg_names}
    absent = [name for name, kind in types.items() if kind is None]  # arguments that are None at this launch
    types |= dict.fromkeys(absent, "constexpr")
    constants = dict(constants) | dict.fromkeys(absent)
    aligned = [name for name, kind in types.items() if kind.startswith(("*", "i")) and name not in odd]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    made = source(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(made, target=GPUTarget("cuda", capability, 32), options=options)


def in_compiling_process(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a module where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, env=environment, cwd=README.parents[1], capture_output=True, text=True)


def figures(case: tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]) -> Figures:
    """Compile one case for sm_90a and read its machine code."""
    made = compiled(case)
    ptx, said = made.asm["ptx"], _assembler_says(made.asm["ptx"])
    sass = _disassembled(made.asm["cubin"]).splitlines()
    loops = _innermost_loops(sass)
    loop = min(loops, key=len, default=[])
    mix = collections.Counter(filter(None, map(_opcode, loop)))
    idle = [idle_instructions(loop) for loop in loops]
    constants = case[3]
    groups, in_flight = constants.get("MATH_GROUPS", 0), constants.get("IN_FLIGHT", 1)
    rows = constants.get("BLOCK_M", 64 * groups * constants.get("WAVES", 1))
    accumulators = rows * constants.get("BLOCK_N", 0)
    limits = [int(count) for count in re.findall(r"setmaxnreg\.inc\S+\s+(\d+)", ptx)]
    # the math warps of a specialised kernel are two groups of four, or MATH_GROUPS, whatever num_warps says
    threads = 256 if constants.get("WARP_SPECIALIZE") else 128 * groups or 32 * case[4].get("num_warps", 4)
    return Figures(
        name=case[0],
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        math_registers=constants.get("MATH_REGISTERS") or min(limits, default=0),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        shared_bytes=made.metadata.shared,
        fp8_mma=mix["QGMMA"] // in_flight,
        promotion_fma=mix["FFMA"] // in_flight,
        loop_instructions=sum(mix.values()) // in_flight,
        idle_instructions=max(map(len, idle), default=0) // in_flight,
        expected_fma=accumulators // threads,
        flushes=".ftz" in re.sub(SIGMOID, "", ptx),
        warnings=[line.strip() for line in said.splitlines() if "arning" in line or "serializ" in line.lower()],
        ring=_by_hand_faults(ptx, sass, idle, accumulators // threads, constants) if groups else [],
    )


def _by_hand_faults(
    ptx: str, sass: list[str], idle: list[list[str]], accumulators: int, constants: dict[str, Any]
) -> list[str]:
    found = ring_faults(ptx, constants) + given_back_early(sass, constants)
    loops = idle if constants["AHEAD"] else []
    found += added_elsewhere(sass) if constants["ACCUMULATE"] else []
    return found + sorted({fault for loop in loops for fault in idle_faults(loop, accumulators)})


def added_elsewhere(sass: list[str]) -> list[str]:
    """What is wrong with a GEMM that is to have its sums added in L2, and to wait for nothing."""
    opcodes = [opcode for opcode in map(_opcode, sass) if opcode]
    found = [] if any("REDG" in line for line in sass) else ["nothing is added in L2"]
    return found + ["an addition whose result comes back"] * any(opcode.startswith("ATOMG") for opcode in opcodes)


def idle_instructions(loop: list[str]) -> list[str]:
    """Opcodes between the wait for all multiplications of a warpgroup and the start of the next, around the loop."""
    idle = False
    for _ in range(2):  # how the first round ends says how the second begins, which is the one that counts
        found = []
        for line in loop:
            opcode = _opcode(line)
            if opcode == "WARPGROUP" and re.search("DEPBAR.*gsb0, 0x0", line):
                idle = True
            elif opcode == "QGMMA":
                idle = False
            elif idle and opcode:
                found.append(opcode)
    return found


def idle_faults(idle: list[str], accumulators: int) -> list[str]:
    """What stands there though it could have been done ahead: waits and barriers.

    And whether all promotion does, `accumulators` of a thread: behind the start of the next multiplication it would
    read scales of a slot that has been given back.
    """
    found = [f"{opcode} between two multiplications" for opcode in sorted({"BAR", "SYNCS"} & set(idle))]
    promoted = idle.count("FFMA")
    return found if promoted == accumulators else [*found, f"{promoted} promotions there; needs {accumulators}"]


def ring_faults(ptx: str, constants: dict[str, Any]) -> list[str]:
    """What is wrong with the barriers of a Gluon GEMM.

    A warpgroup waits once and arrives once for each block of K that its code multiplies; it arrives only behind a
    barrier of its own 128 threads, since each of its warps waits for its own part of the multiplication; a box goes to
    global memory only behind a fence and such a barrier. The producer announces the bytes of all boxes of a slot. With
    AHEAD all wait once more, for the first slot and the last, which the producer completes without bytes.
    """
    groups, abreast = constants["MATH_GROUPS"], constants["ABREAST"]
    boxes = groups // abreast * constants["WAVES"]
    columns = abreast * constants["BLOCK_N"]
    multiplied = groups * (1 if constants["IN_FLIGHT"] == 1 else constants["IN_FLIGHT"] + 1)  # a pair, and the odd one
    scales = constants["B_ROWS"] == 1  # those of b come with the slot
    ahead = constants["AHEAD"]
    wanted = {
        r"mbarrier\.try_wait": (multiplied + 1) * (2 if ahead else 1),
        r"mbarrier\.arrive\.shared": multiplied + ahead,
        rf"mbarrier\.arrive\.expect_tx\S+ _, \[\S+\], {128 * (64 * boxes + columns) + 4 * scales * columns};": 1,
        r"mbarrier::complete_tx": boxes + abreast * (1 + scales + (scales and ahead)),  # quads: two boxes
        r"wgmma\.mma_async": 4 * multiplied,
        rf"setmaxnreg\S+\s+{constants['MATH_REGISTERS']};": groups,
        r"wgmma\.wait_group\.sync\.aligned\s+1;": groups * (constants["IN_FLIGHT"] - 1),
    }
    found = [
        f"{len(re.findall(what, ptx))} of {what}; needs {n}"
        for what, n in wanted.items()
        if len(re.findall(what, ptx)) != n
    ]
    consumers, copied, behind_copies = ptx.rpartition("complete_tx")
    ptx = consumers + copied + behind_copies.replace("mbarrier.arrive.shared", "", 1 if ahead else 0)
    marks = "wgmma.wait_group|wgmma.mma_async|bar.sync|mbarrier.arrive.shared|fence.proxy.async|tensor.2d.global.shared"
    order = [mark for mark, _ in itertools.groupby(re.findall(marks.replace(".", "[.]"), ptx))]
    # scales that a slot brought are on their way until the next multiplication has been started
    read = "wgmma.mma_async" if ahead or scales else "wgmma.wait_group"
    before = {"mbarrier.arrive.shared": read, "tensor.2d.global.shared": "fence.proxy.async"}
    for at, mark in enumerate(order):
        behind = order[at - 2 : at]
        if mark == "mbarrier.arrive.shared" and constants["WAVES"] == 2 and behind[-1:] == ["bar.sync"]:
            continue  # a block of its own, behind the loop over the waves: its place in the text says no more
        if behind == ["mbarrier.arrive.shared", "bar.sync"] and mark == behind[0] and read == "wgmma.mma_async":
            continue  # the second slot of a pair
        if mark in before and behind != [before[mark], "bar.sync"]:
            found.append(f"{mark} behind {', '.join(order[max(at - 2, 0) : at])}; needs {before[mark]}, bar.sync")
    return found


def given_back_early(sass: list[str], constants: dict[str, Any]) -> list[str]:
    """What is wrong with the order of a GEMM whose slots bring scales: see _give_back in kernels/gemm_gluon_sum.py.

    Between two waits for multiplications a warpgroup starts those of a block, or of a pair of blocks, and then gives
    back as many slots; it reads scales, and promotes, behind all of that.
    """
    if constants["B_ROWS"] != 1:
        return []
    found, started, returned = [], 0, 0
    for line in sass:
        opcode = _opcode(line)
        if opcode == "QGMMA":
            if returned:
                found.append("a slot is given back between the multiplications of a pair")
            started += 1
        elif "SYNCS.ARRIVE" in line and started:
            returned += 1
        elif opcode in ("LDS", "FFMA") and started:
            if 4 * returned != started:
                found.append(f"{returned} slots are given back behind {started} multiplications; needs {started // 4}")
            started = returned = 0
    return sorted(set(found))


def other_architectures() -> list[str]:
    """What is wrong with the plain GEMMs on Ada (pointers) and on datacentre Blackwell (all entries without roles)."""
    found = []
    for case in cases():
        words = case[0].split()
        if not words[0].startswith("gemm") or words[1].startswith(("ws_", "gluon_")):
            continue
        wanted = {100: "tcgen05.mma"} | ({89: "e4m3.f32"} if words[1].startswith("pointer") else {})
        for capability, instruction in wanted.items():
            ptx = compiled(case, capability).asm["ptx"]
            found += [] if instruction in ptx else [f"sm_{capability} {case[0]}: no {instruction}"]
            found += [f"sm_{capability} {case[0]}: flushes subnormal numbers"] if ".ftz" in ptx else []
    return found


def _assembler_says(ptx: str) -> str:
    """Registers, spills and warnings: what this Triton's assembler prints about the code that it makes for sm_90a."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        command += ["--regAllocOptLevel=2"] if triton_version() >= (3, 9) else []  # as that Triton calls it
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def triton_version() -> tuple[int, ...]:
    """Major and minor version of the installed Triton."""
    import triton

    return tuple(int(number) for number in triton.__version__.split(".")[:2])


def _disassembled(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout


def _innermost_loops(lines: list[str]) -> list[list[str]]:
    """Lines of the loops that multiply in FP8, one for each warpgroup that has its own code; [] if none does."""
    labels, spans = {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        # conditional: the way back from a wait that is kept out of line is no loop
        jump = re.search(r"@!?U?P\d\s+BRA[^`]*`\((\.L_x_\d+)\)", line)
        if jump and jump[1] in labels:
            spans.append(range(labels[jump[1]], number + 1))
    multiply = [span for span in spans if any("QGMMA" in lines[at] for at in span)]
    inner = [span for span in multiply if not any(other != span and other[0] in span for other in multiply)]
    return [[lines[at] for at in span] for span in inner]


def _opcode(line: str) -> str | None:
    found = re.match(r"\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)", line)
    return found[1] if found else None


def table(rows: Sequence[Figures]) -> str:
    """The table of kernels/README.md, with its markers."""
    import triton

    head = COLUMNS.split("|")
    lines = [BEGIN, f"Triton {triton.__version__}, sm_90a:", "", f"| {' | '.join(head)} |"]
    lines += ["| --- |" + " --: |" * (len(head) - 1), *(row.row() for row in rows), "", END]
    return "\n".join(lines)


def table_in_readme() -> str:
    """The table as it stands in kernels/README.md."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def main(argv: Sequence[str]) -> int:
    """Compile everything; 1 if something must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.sm90", description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    for name in ("check", "write", "json", "others"):
        action.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args(argv)
    import fp8train  # noqa: F401  mounts fp8train.kernels

    if arguments.others:
        faults = other_architectures()
        sys.stdout.write("".join(f"{line}\n" for line in faults))
        return 1 if faults else 0
    rows = [figures(case) for case in cases()]
    if arguments.json:
        json.dump([dataclasses.asdict(row) for row in rows], sys.stdout)
        return 0
    faults = [f"{row.name}: {fault}" for row in rows for fault in row.faults()]
    sys.stdout.write("".join(f"{line}\n" for line in [table(rows), *faults]))
    if arguments.write and not faults:
        README.write_text(README.read_text(encoding="utf-8").replace(table_in_readme(), table(rows)), encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main(sys.argv[1:]))
