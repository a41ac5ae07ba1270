"""coverage.json in few words: which GEMMs ran in FP8, their share of the FLOPs, and why the others did not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fp8train.backends.coverage import GEMMS


@dataclasses.dataclass(kw_only=True, slots=True)
class GemmShare:
    """FLOPs of one kind of GEMM over all linears: those in FP8 and all."""

    gemm: str
    fp8_flops: float
    flops: float


@dataclasses.dataclass(kw_only=True, slots=True)
class LinearGroup:
    """Linears that differ only in the numbers of their module paths, such as the same projection of every layer.

    pattern: module path with `*` for what differs. fqns: the members. shape: N x K, or E x N x K. ran: GEMM -> words
    for what executed.
    fp8: GEMM -> whether it ran in FP8 and nothing else. broken: GEMMs that were to run in FP8 and did not (always).
    changed: schedule or alarm gave it another precision during a run; then nothing of it is broken in that.
    flops: of all members and GEMMs. rule, reason: what decided; the reason is schedule's or alarm's where they did.
    """

    pattern: str
    fqns: list[str]
    shape: tuple[int, ...]
    ran: dict[str, str]
    fp8: dict[str, bool]
    broken: list[str]
    changed: bool
    flops: float
    rule: str
    reason: str


def merged_coverage(runs: Mapping[int, Mapping[str, Any]]) -> Mapping[str, Any]:
    """One coverage.json for the seeds of an arm: counts added up, and what only some of them say with their seed.

    Args:
        runs: seed -> coverage.json.
    """
    if len(runs) < 2:
        return next(iter(runs.values()), {})
    known = {seed: {linear["fqn"]: linear for linear in coverage.get("linears", ())} for seed, coverage in runs.items()}
    linears = [
        {**next(own[fqn] for own in known.values() if fqn in own), **_merged_linear(fqn, known)}
        for fqn in dict.fromkeys(fqn for own in known.values() for fqn in own)
    ]
    lists = {
        key: _of_seeds({seed: tuple(coverage.get(key) or ()) for seed, coverage in runs.items()})
        for key in ("refused_kernels", "decoded")
    }
    return {**next(iter(runs.values())), "linears": linears, **lists}


def _merged_linear(fqn: str, known: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of a linear over all seeds, and what has changed it in which."""
    found = {seed: own[fqn] for seed, own in known.items() if fqn in own}
    gemms: dict[str, dict[str, Any]] = {}
    for gemm in dict.fromkeys(gemm for linear in found.values() for gemm in linear["gemms"]):
        counts = [linear["gemms"].get(gemm, {}) for linear in found.values()]
        rows = {key: sum(count.get(key, 0) for count in counts) for key in ("fp8_rows", "other_rows")}
        unplanned = sum(_unplanned(linear, linear["gemms"].get(gemm, {})) for linear in found.values())
        gemms[gemm] = {**counts[0], **rows, "unplanned_rows": unplanned}
    changed = _of_seeds({seed: tuple(filter(None, [linear.get("changed")])) for seed, linear in found.items()})
    return {"gemms": gemms, "changed": "; ".join(changed) or None}


def _unplanned(linear: Mapping[str, Any], count: Mapping[str, Any]) -> int:
    """Rows that were to run in FP8 and did not, in a linear of which neither schedule nor alarm made something else."""
    planned = count.get("planned") == "fp8" and not linear.get("changed")
    return int(count.get("other_rows", 0)) if planned else 0


def _of_seeds(said: Mapping[int, tuple[str, ...]]) -> list[str]:
    """What all seeds say once, and what only some say with their numbers before it."""
    texts = dict.fromkeys(text for own in said.values() for text in own)
    by = {text: [seed for seed, own in said.items() if text in own] for text in texts}
    return [
        text if len(seeds) == len(said) else f"seed {', '.join(map(str, seeds))}: {text}" for text, seeds in by.items()
    ]


def refused_kernels(coverage: Mapping[str, Any]) -> str:
    """Which kernels were not used and why, in one sentence; '' where all passed their checks."""
    refused, decoded = (coverage.get(key) or [] for key in ("refused_kernels", "decoded"))
    words = [f"refused on its machine, so that others took their place: {'; '.join(refused)}"] if refused else []
    if decoded:
        words.append(f"no FP8 unit multiplied in {'; '.join(decoded)}: FP8 numbers were decoded and multiplied in BF16")
    return "; ".join(words)


def gemm_shares(coverage: Mapping[str, Any]) -> list[GemmShare]:
    """FLOPs per kind of GEMM, counted at run time: 2 rows N K for each linear."""
    shares = []
    for gemm in GEMMS:
        rows = [(linear, linear["gemms"].get(gemm, {})) for linear in coverage.get("linears", ())]
        fp8 = sum(_flops(linear["shape"], count.get("fp8_rows", 0)) for linear, count in rows)
        other = sum(_flops(linear["shape"], count.get("other_rows", 0)) for linear, count in rows)
        shares.append(GemmShare(gemm=gemm, fp8_flops=fp8, flops=fp8 + other))
    return shares


def group_linears(coverage: Mapping[str, Any]) -> list[LinearGroup]:
    """Linears grouped by path pattern, shape, outcome, rule and reason, in the order of the model."""
    groups: dict[tuple[Any, ...], LinearGroup] = {}
    for linear in coverage.get("linears", ()):
        counts = {gemm: linear["gemms"].get(gemm, {}) for gemm in GEMMS}
        ran = {gemm: _ran(count) for gemm, count in counts.items()}
        broken = [gemm for gemm, count in counts.items() if count.get("unplanned_rows", _unplanned(linear, count))]
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", linear["fqn"])
        words = (str(linear.get("rule") or ""), str(linear.get("changed") or linear.get("reason") or ""))
        key = (pattern, tuple(linear["shape"]), tuple(ran.values()), *words)
        group = groups.get(key)
        if group is None:
            fp8 = {gemm: bool(count.get("fp8_rows")) and not count.get("other_rows") for gemm, count in counts.items()}
            group = groups[key] = LinearGroup(
                pattern=pattern,
                fqns=[],
                shape=tuple(linear["shape"]),
                ran=ran,
                fp8=fp8,
                broken=broken,
                changed=bool(linear.get("changed")),
                flops=0.0,
                rule=words[0],
                reason=words[1],
            )
        group.fqns.append(linear["fqn"])
        rows = sum(count.get("fp8_rows", 0) + count.get("other_rows", 0) for count in counts.values())
        group.flops += _flops(linear["shape"], rows)
    for group in groups.values():
        if len(group.fqns) == 1:
            group.pattern = group.fqns[0]
    return list(groups.values())


def exceptions(groups: Sequence[LinearGroup]) -> list[LinearGroup]:
    """Groups with a GEMM that ran outside FP8, the most FLOPs first."""
    return sorted((group for group in groups if not all(group.fp8.values())), key=lambda group: -group.flops)


def layer_numbers(fqns: Sequence[str]) -> str:
    """The layer numbers of module paths, as ranges: `0-3, 5`; '' where the paths have none or more than one that
    differs.
    """
    found = [tuple(int(part) for part in re.findall(r"(?<=\.)\d+(?=\.|$)", fqn)) for fqn in fqns]
    if any(len(numbers) != 1 for numbers in found):
        return ""
    numbers = sorted(number for (number,) in found)
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _ran(count: Mapping[str, Any]) -> str:
    """What a GEMM ran in: `FP8`, `BF16`, `FP8 97.0 %`, or `not run`."""
    fp8, other = count.get("fp8_rows", 0), count.get("other_rows", 0)
    if not fp8 and not other:
        return "not run"
    if fp8 and other:
        return f"FP8 {100 * fp8 / (fp8 + other):.1f} %"
    if fp8:
        return "FP8"
    planned = str(count.get("planned", ""))
    return planned.upper() if planned not in ("", "fp8") else "not FP8"


def _flops(shape: Sequence[int], rows: int) -> float:
    """2 rows N K; of a grouped linear [E, N, K] each row meets one expert."""
    return 2.0 * rows * shape[-2] * shape[-1]
