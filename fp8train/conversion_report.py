"""What a conversion decided for every linear, and what ran: rows, table, coverage."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fp8train.backends import get_backend
from fp8train.backends.coverage import COUNTS, GEMMS, Counts, GemmCount
from fp8train.nn.weights import COPIES
from fp8train.quant.formats import LinearPrecision
from fp8train.units import bytes_text, percent_text
from fp8train.unreached import UnreachedRow, joined

AS_IS = "as is"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionRow:
    """One linear of a converted model.

    Args:
        fqn: module path, the first where the module is reachable by several.
        shape: of the weight, [N, K].
        has_bias: whether a bias goes with it.
        numbers: its precision; None where the module is a subclass of nn.Linear that was left as it is.
        backend: what executes its GEMMs; "torch" where it was left as it is.
        rule: the rule that decided, e.g. "3: *layers.*".
        reason: why it has this precision, in words.
        site: its number in the run-time counts; 0 where nothing is counted.
        copies: of an FP8 weight that are kept between steps: "both", or "one", that of fprop.
        other_names: further module paths of the same module.
    """

    fqn: str
    shape: tuple[int, int]
    has_bias: bool
    numbers: LinearPrecision | None
    backend: str
    rule: str
    reason: str
    site: int
    copies: str = COPIES[0]
    other_names: tuple[str, ...] = ()

    @property
    def out_features(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape[1]

    @property
    def precision(self) -> str:
        """Name of the precision in the recipe."""
        return AS_IS if self.numbers is None else self.numbers.name

    @property
    def fprop(self) -> str:
        """Operands of fprop in words, e.g. "e4m3 1x128 pow2 * e4m3 128x128 pow2"."""
        return self.operands("fprop")

    @property
    def dgrad(self) -> str:
        """Operands of dgrad in words."""
        return self.operands("dgrad")

    @property
    def wgrad(self) -> str:
        """Operands of wgrad in words."""
        return self.operands("wgrad")

    def operands(self, gemm: str) -> str:
        """Operands of one GEMM in words."""
        return AS_IS if self.numbers is None else self.numbers.describe(gemm)

    def planned(self, gemm: str) -> str:
        """What one GEMM multiplies in: "fp8", "bf16" or "fp32"; "as is" where the module was left alone."""
        if self.numbers is None:
            return AS_IS
        if self.numbers.gemms[gemm].fp8:
            return "fp8"
        return "fp32" if self.numbers.high is torch.float32 else "bf16"

    @property
    def master_bytes(self) -> int:
        """FP32 weight and bias."""
        N, K = self.shape
        return 4 * (N * K + (N if self.has_bias else 0))

    @property
    def code_bytes(self) -> int:
        """Copies of the weight kept for the GEMMs: one byte an element in FP8, two in BF16; FP32 reads the master."""
        return self._copies()[0]

    @property
    def scale_bytes(self) -> int:
        """FP32 scales of the FP8 copies."""
        return self._copies()[1]

    def _copies(self) -> tuple[int, int]:
        """(bytes of elements, bytes of scales) of the weight copies for fprop [N, K] and dgrad [K, N]."""
        if self.numbers is None:
            return 0, 0
        N, K = self.shape
        elements = scales = 0
        high_copy = False
        for turned, spec, rows, cols in (
            (False, self.numbers.fprop.right, N, K),
            (True, self.numbers.dgrad.right, K, N),
        ):
            if spec is None:
                high_copy = high_copy or self.numbers.high is not torch.float32
                continue
            if turned and self.copies != COPIES[0]:
                continue
            scale_rows, scale_cols = spec.scale_shape(rows, cols)
            elements += N * K
            scales += 4 * scale_rows * scale_cols
        return elements + (2 * N * K if high_copy else 0), scales

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return {
            "fqn": self.fqn,
            "shape": list(self.shape),
            "precision": self.precision,
            **{gemm: self.operands(gemm) for gemm in GEMMS},
            "backend": self.backend,
            "rule": self.rule,
            "reason": self.reason,
            "site": self.site,
            "other_names": list(self.other_names),
            "bytes": {"master": self.master_bytes, "codes": self.code_bytes, "scales": self.scale_bytes},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerRow:
    """A norm before linears, or an MLP, and whether it makes their FP8 input itself (nn/fused.py).

    Args:
        fqn: module path.
        linears: module paths of the linears that read it, or that it consists of.
        refusal: why it stays as it was; None where it was fused.
    """

    fqn: str
    linears: tuple[str, ...]
    refusal: str | None

    def text(self) -> str:
        """In words, e.g. "layers.0.input_layernorm -> q_proj, k_proj, v_proj"."""
        return f"{self.fqn} -> {', '.join(linear.rpartition('.')[2] for linear in self.linears)}"

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        return {"fqn": self.fqn, "linears": list(self.linears), "fused": self.refusal is None, "reason": self.refusal}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeRow:
    """A rotary embedding, and whether a kernel rotates queries and keys in eager runs (nn/fused.py).

    Args:
        fqn: module path.
        refusal: why the formula does; None where a kernel does.
    """

    fqn: str
    refusal: str | None

    def text(self) -> str:
        """Its module path."""
        return self.fqn

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        return {"fqn": self.fqn, "kernel": self.refusal is None, "reason": self.refusal}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What convert_model did.

    Args:
        recipe: name of the recipe.
        recipe_hash: its hash.
        backend: name of the backend.
        backend_reason: one line: why this one, and why not the others.
        rows: one for each linear, in the order of the model.
        others: modules with matrices that are no nn.Linear: recipes do not reach them.
        producers: norms and MLPs of known classes.
        ropes: rotary embeddings of known classes.
    """

    recipe: str
    recipe_hash: str
    backend: str
    backend_reason: str
    rows: tuple[ConversionRow, ...]
    others: tuple[UnreachedRow, ...] = ()
    producers: tuple[ProducerRow, ...] = ()
    ropes: tuple[RopeRow, ...] = ()

    def planned_fp8_share(self) -> float:
        """Share of the linears' FLOPs that are planned in FP8, if every linear sees the same number of rows."""
        flops = {True: 0, False: 0}
        for row in self.rows:
            for gemm in GEMMS:
                flops[row.planned(gemm) == "fp8"] += 2 * row.out_features * row.in_features
        return flops[True] / max(sum(flops.values()), 1)

    def table(self, *, every: bool = False) -> str:
        """A line for each linear, or (default) each group that differs in indices only: layers.{0..31}.mlp.up_proj.

        Below them a line for what the recipe does not reach, with its share of all matrices but embeddings.
        """
        groups = [(row.fqn, 1, row) for row in self.rows] if every else collapse(self.rows)
        lines = [["module", "count", "weight", "precision", *GEMMS, "rule", "backend", "master", "copies", "scales"]]
        for label, count, row in groups:
            N, K = row.shape
            lines.append(
                [
                    label,
                    str(count),
                    f"[{N}, {K}]",
                    row.precision,
                    *(row.planned(gemm) for gemm in GEMMS),
                    row.rule,
                    row.backend,
                    *(bytes_text(count * size) for size in (row.master_bytes, row.code_bytes, row.scale_bytes)),
                ]
            )
        text = align(lines, right=("count", "master", "copies", "scales"))
        return "\n".join([text, *(f"not reached: {line}" for line in self._not_reached())])

    def _not_reached(self) -> list[str]:
        groups, of_linears = joined(self.others), sum(row.out_features * row.in_features for row in self.rows)
        whole = of_linears + sum(groups.values())
        return [
            f"{path} ({kind}), {percent_text(100 * elements / max(whole, 1), digits=1)} of the matrix parameters"
            for (path, kind), elements in groups.items()
        ]

    def copy_bytes(self, without: Collection[str] = ()) -> int:
        """Bytes that the GEMMs read in place of the weights, codes and scales, kept from step to step.

        without: module paths of linears that keep none, since their weights are gathered when they are used.
        """
        return sum(row.code_bytes + row.scale_bytes for row in self.rows if row.fqn not in without)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "recipe": self.recipe,
            "recipe_hash": self.recipe_hash,
            "backend": self.backend,
            "backend_reason": self.backend_reason,
            "planned_fp8_share": self.planned_fp8_share(),
            "linears": [row.to_dict() for row in self.rows],
            "not_linears": [{"fqn": row.fqn, "class": row.kind} for row in self.others],
            "producers": [row.to_dict() for row in self.producers],
            "ropes": [row.to_dict() for row in self.ropes],
        }

    def coverage(self, counts: Counts | None = None) -> dict[str, Any]:
        """What the GEMMs ran in, by these counts or those since the last reset; FLOPs = 2 * rows * N * K.

        fp8_flops_share is of the FLOPs of the linears that are counted; uncounted: subclasses of nn.Linear that were
        left as they are, whose GEMMs are not. not_reached: matrices of what is no linear, in words. decoded: GEMMs for
        which no kernel passed, so that torch multiplies decoded numbers. refused_kernels: those that failed the check
        on their first use so far, each with the reason. precision, rule, reason of a linear are the recipe's; changed:
        what schedule or alarm made of it since, or null.
        """
        counts = COUNTS.snapshot() if counts is None else counts
        fp8_flops = other_flops = 0
        linears = []
        for row in self.rows:
            own = {gemm: counts.get(row.site, {}).get(gemm, GemmCount()) for gemm in GEMMS}
            gemms = {}
            for gemm, count in own.items():
                fp8_flops += 2 * count.fp8_rows * row.out_features * row.in_features
                other_flops += 2 * count.other_rows * row.out_features * row.in_features
                why = exception(row, gemm, count, own["fprop"])
                gemms[gemm] = {"planned": row.planned(gemm), **asdict(count), "exception": why}
            keys = {"fqn": row.fqn, "shape": list(row.shape), "precision": row.precision}
            words = {"rule": row.rule, "reason": row.reason, "changed": COUNTS.changed(row.site)}
            linears.append({**keys, **words, "gemms": gemms})
        backend = get_backend(self.backend)
        return {
            "backend": self.backend,
            "emulates": backend.emulates or bool(backend.decoded),
            "refused_kernels": backend.refused,
            "decoded": list(backend.decoded),
            "recipe": self.recipe,
            "fp8_flops_share": fp8_flops / max(fp8_flops + other_flops, 1),
            "linears": linears,
            "uncounted": [row.fqn for row in self.rows if row.numbers is None],
            "not_reached": self._not_reached(),
        }


def exception(row: ConversionRow, gemm: str, count: GemmCount, forward: GemmCount) -> str | None:
    """Why a GEMM did not run in FP8, or not all of it; None where it did. forward: the count of the linear's fprop."""
    planned = row.planned(gemm)
    if planned != "fp8":
        whole = row.numbers is None or not row.numbers.any_fp8
        return f"{planned}: {row.reason}" if whole else f"{planned}: precision {row.precision} says so"
    if count.other_rows:
        some = " for some rows" if count.fp8_rows else ""
        return COUNTS.changed(row.site) or f"ran in high precision{some}: its precision was changed during the run"
    if count.fp8_rows:
        return None
    tokens = "no tokens reached it" if not forward.fp8_rows + forward.other_rows else "no gradient was asked of it"
    return COUNTS.reason(row.site, gemm) or tokens


def collapse(rows: Iterable[ConversionRow]) -> list[tuple[str, int, ConversionRow]]:
    """Join rows that differ only in indices of their path and in site: (label, number of linears, first row)."""
    groups: list[tuple[tuple[str, ...], int, ConversionRow]] = [(tuple(row.fqn.split(".")), 1, row) for row in rows]
    for place in reversed(range(max((len(words) for words, _, _ in groups), default=0))):
        joined: dict[Hashable, list[tuple[tuple[str, ...], int, ConversionRow]]] = {}
        for words, count, row in groups:
            index = words[place] if place < len(words) else ""
            pattern = (*words[:place], "#", *words[place + 1 :]) if index.isdigit() else words
            alike = (row.shape, row.has_bias, row.numbers, row.backend, row.rule, row.other_names)
            joined.setdefault((pattern, alike), []).append((words, count, row))
        groups = [_join(members, place) for members in joined.values()]
    return [(".".join(words), count, row) for words, count, row in groups]


def _join(
    members: Sequence[tuple[tuple[str, ...], int, ConversionRow]], place: int
) -> tuple[tuple[str, ...], int, ConversionRow]:
    words, count, row = members[0]
    if len(members) == 1:
        return words, count, row
    indices = index_ranges(int(words[place]) for words, _, _ in members)
    return (*words[:place], indices, *words[place + 1 :]), sum(count for _, count, _ in members), row


def index_ranges(indices: Iterable[int]) -> str:
    """Indices in short: "{0..31}", "{0,1,5..7}"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(parts) + "}"


def align(lines: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Lines of cells as columns two spaces apart; columns whose header is in `right` align to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    to_right = [name in right for name in lines[0]]

    def text(line: Sequence[str]) -> str:
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, to_right, strict=True))
        return "  ".join(cells).rstrip()

    return "\n".join(text(line) for line in lines)
