"""What the kernels must reach on an H200, and what the newest measurement of each says: a table of kernels/README.md.

The wanted figures are those that the project set itself. Measured ones come from kernels/results/ alone, always the
newest file of an H200 that has the bench; where single entries were timed, ours is what the launch table picks today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8train.kernels.gemm_table import TABLE, ordered
from fp8train.units import ratio_text

DEVICE = "H200"
MULTIPROCESSORS = 132
HOPPER = 9  # major compute capability of its rates in the launch table
LARGE = 1536  # the smallest N and K of the shapes that are to reach 1 PFLOP/s
BOTH_TIMES = 1.15  # of the time of a copy of as many bytes
OWN = "triton"

Result = Mapping[str, Any]
Files = Sequence[tuple[str, Mapping[str, Any]]]  # name and content of kernels/results/*.json, the newest first


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a file says of one target: how many cases reach it, and the least of them."""

    reached: int
    cases: int
    least: str
    source: str


def table(files: Files) -> list[str]:
    """A line for each target: what is wanted, how many cases reach it, the worst case, the file."""
    lines = ["| wanted | reached | the least | file of results/ |", "| --- | --: | --- | --- |"]
    own = [(name, content) for name, content in files if DEVICE in content["environment"]["device"]["name"]]
    for wanted, find in _TARGETS:
        found = find(own)
        cells = "- | not measured yet | -"
        if found is not None:
            cells = f"{found.reached} of {found.cases} | {found.least} | {found.source}"
        lines.append(f"| {wanted} | {cells} |")
    return lines


def _benches(files: Files, subject: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Name of the file, step of gpu_check and bench, the newest first."""
    for name, content in files:
        for step, bench in content.items():
            if isinstance(bench, dict) and bench.get("subject") == subject:
                yield name, step, bench


def _seconds(result: Result, contestant: str) -> float:
    return result["timings"][contestant]["median_seconds"]


def _picked(result: Result) -> str | None:
    """The contestant that is ours: what the backend took, or the entry that the launch table picks today."""
    if OWN in result["timings"]:
        return OWN
    operation = "gemm_wgrad" if result["gemm"] == "wgrad" else "gemm"
    rows, cols = {"fprop": ("M", "N"), "dgrad": ("M", "K"), "wgrad": ("N", "K")}[result["gemm"]]
    best = ordered(TABLE[operation, HOPPER], result[rows], result[cols], MULTIPROCESSORS)[0]
    return f"{OWN}:{best}" if f"{OWN}:{best}" in result["timings"] else None


def _gemms(files: Files, names: Sequence[str], against: str | None) -> tuple[str, list[tuple[Result, float]]]:
    """Source and, of its newest bench with these GEMMs, each result with our rate, or with it over a contestant's."""
    for source, _, bench in _benches(files, "gemm"):
        if bench["arguments"].get("accumulate"):
            continue
        rows = []
        for result in bench["results"]:
            picked = _picked(result) if result.get("gemm") in names else None
            if picked is None or (against is not None and against not in result["timings"]):
                continue
            base = result["flops"] / 1e15 if against is None else _seconds(result, against)
            rows.append((result, base / _seconds(result, picked)))
        if rows:
            return source, rows
    return "", []


def _count(rows: Sequence[tuple[str, float]], limit: float, text: Callable[[float], str], source: str) -> Finding:
    title, least = min(rows, key=lambda row: row[1])
    return Finding(
        reached=sum(value >= limit for _, value in rows),
        cases=len(rows),
        least=f"{text(least)}, {title}",
        source=source,
    )


def _rate(value: float) -> str:
    return f"{value:.2f} PFLOP/s"


def _gemm_target(
    names: Sequence[str], limit: float, against: str | None = None, smallest: int = 0
) -> Callable[[Files], Finding | None]:
    def find(files: Files) -> Finding | None:
        source, rows = _gemms(files, names, against)
        kept = [(result["title"], value) for result, value in rows if min(result["N"], result["K"]) >= smallest]
        return _count(kept, limit, _rate if against is None else ratio_text, source) if kept else None

    return find


def _quantiser_target(cases: Sequence[str], limit: float) -> Callable[[Files], Finding | None]:
    def find(files: Files) -> Finding | None:
        for source, _, bench in _benches(files, "quantize"):
            own = [result for result in bench["results"] if result.get("case") in cases]
            if own:
                rows = [(result["title"], result["share_of_copy_bandwidth"]) for result in own]
                return _count(rows, limit, lambda share: f"{share:.1%}".replace("%", " %"), source)
        return None

    return find


def _against_bf16(
    files: Files, subject: str, size: int | None, ratio: Callable[[Result, str], float | None]
) -> tuple[str, list[tuple[str, float]]]:
    """Source and, of the newest file with such a bench against BF16, each case with ratio(result, the other arm).

    size: of linears, both their dimensions.
    """
    newest = ""
    rows: list[tuple[str, float]] = []
    for source, step, bench in _benches(files, subject):
        if newest not in ("", source):
            break
        for result in bench["results"]:
            other = next(name for name in result["timings"] if name != "bf16")
            wanted = "bf16" in result["timings"] and size in (None, result.get("N"))
            value = ratio(result, other) if wanted else None
            if value is not None:
                newest = source
                rows.append((step, value))
    return newest, rows


def _speed_target(subject: str, limit: float, size: int | None = None) -> Callable[[Files], Finding | None]:
    """How many times BF16's speed."""

    def find(files: Files) -> Finding | None:
        source, rows = _against_bf16(files, subject, size, lambda result, other: 1 / result["timings"][other]["ratio"])
        return _count(rows, limit, ratio_text, source) if rows else None

    return find


def _peak_target(limit: float) -> Callable[[Files], Finding | None]:
    """Peak memory of a step over that of BF16's, at most `limit`."""

    def share(result: Result, other: str) -> float | None:
        peaks = result.get("peak_bytes")
        return peaks[other] / peaks["bf16"] if peaks else None

    def find(files: Files) -> Finding | None:
        source, rows = _against_bf16(files, "step", None, share)
        negated = [(step, -value) for step, value in rows]
        return _count(negated, -limit, lambda value: ratio_text(-value), source) if rows else None

    return find


def _host_target(limit: float) -> Callable[[Files], Finding | None]:
    def find(files: Files) -> Finding | None:
        for source, _, bench in _benches(files, "host"):
            rows = [(result["title"], -result["extra_microseconds"]) for result in bench["results"]]
            return _count(rows, -limit, lambda value: f"{-value:.1f} us", source)
        return None

    return find


_BOTH = ("fprop", "dgrad")
_TARGETS: tuple[tuple[str, Callable[[Files], Finding | None]], ...] = (
    ("fprop, dgrad: at least the speed of cuBLASLt", _gemm_target(_BOTH, 1.0, "cublaslt")),
    (f"fprop, dgrad with N and K of at least {LARGE}: 1.0 PFLOP/s", _gemm_target(_BOTH, 1.0, smallest=LARGE)),
    ("then 1.3 PFLOP/s, which DeepGEMM has", _gemm_target(_BOTH, 1.3, smallest=LARGE)),
    ("wgrad: 0.85 PFLOP/s", _gemm_target(("wgrad",), 0.85)),
    ("quantisers: 85 % of the rate of a copy", _quantiser_target(("row", "column", "weight"), 0.85)),
    (
        "with a norm or SwiGLU before them: the same",
        _quantiser_target(("rmsnorm", "add_rmsnorm", "swiglu", "swiglu_backward"), 0.85),
    ),
    (f"both copies: {BOTH_TIMES}x the time of their bytes, so 87 %", _quantiser_target(("both",), 1 / BOTH_TIMES)),
    ("linear 4096 x 4096, forward + backward: 1.4x BF16", _speed_target("linear", 1.4, 4096)),
    ("linear 8192 x 8192: 1.6x", _speed_target("linear", 1.6, 8192)),
    ("step of four layers of the 8b shape: 1.3x", _speed_target("step", 1.3)),
    ("its peak memory: 0.9x", _peak_target(0.9)),
    ("host time of a linear over nn.Linear: 60 us", _host_target(60.0)),
)
