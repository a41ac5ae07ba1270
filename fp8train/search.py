"""Write a recipe that keeps the most sensitive linears in BF16: `fp8train search level=L10 out=FILE [KEY=VALUE ...]`.

One of three: level=L10 takes the ten most sensitive linears, beside those of `manual`; fraction=0.1 as many as make up
a tenth of the linears, those of `manual` included; loss_budget=0.001 the fewest that bring the calibration loss within
so many nats of BF16. Linears that read one input (q, k, v; gate, up) move together.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp8train.backends.coverage import GEMMS
from fp8train.calibration import NEEDS_GRADIENTS, LinearSensitivity, ranked
from fp8train.calibration_setup import CalibrationArguments, check_out, headline, set_up, show_progress
from fp8train.conversion_report import ConversionReport, align
from fp8train.errors import ConfigError, exit_code
from fp8train.nn.shared_inputs import input_groups
from fp8train.quant.formats import BF16
from fp8train.recipe import Recipe, layer_positions, load_recipe, nearest_paths
from fp8train.trainer.run_folder import write_file
from fp8train.units import bytes_text

_LEVEL = re.compile(r"L(\d+)")
DEFAULT_OUT = Path("searched.yaml")


@dataclass(kw_only=True, slots=True)
class SearchArguments(CalibrationArguments):
    """Keep the most sensitive linears in BF16 and write the recipe; one of level, fraction and loss_budget.

    level: such as L10: the ten most sensitive linears beside those of manual; L0: those of manual alone
    fraction: share of the linears, manual included, that goes to BF16
    loss_budget: nats by which the calibration loss may exceed that of BF16; as few linears as will do
    max_fraction: what fraction and loss_budget may reach at most
    manual: module paths or globs that go to BF16 whatever their rank
    first: so many first layers go to BF16
    last: so many last layers go to BF16
    """

    level: str | None = None
    fraction: float | None = None
    loss_budget: float | None = None
    max_fraction: float = 0.2
    manual: list[str] = field(default_factory=list)
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        CalibrationArguments.__post_init__(self)
        given = [name for name in ("level", "fraction", "loss_budget") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ConfigError(f"search: got {got} of level, fraction, loss_budget; needs one. Try level=L10.")
        if self.level is not None and _LEVEL.fullmatch(self.level) is None:
            raise ConfigError(f"level: got {self.level!r}; needs L and a number, such as L10.")
        if not 0 < self.max_fraction <= 1:
            raise ConfigError(f"max_fraction: got {self.max_fraction}; needs 0 < max_fraction <= 1.")
        if self.fraction is not None and not 0 <= self.fraction <= self.max_fraction:
            raise ConfigError(
                f"fraction: got {self.fraction}; needs 0 to max_fraction={self.max_fraction}. Raise max_fraction too, "
                "or lower fraction."
            )
        if self.loss_budget is not None and not self.loss_budget >= 0:
            raise ConfigError(f"loss_budget: got {self.loss_budget}; needs at least 0 nats.")
        if min(self.first, self.last) < 0:
            raise ConfigError(f"search: got first={self.first} last={self.last}; needs at least 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What goes to BF16.

    searched: linears that their rank chose, in the order of the model, groups complete
    manual: those that manual names, groups complete
    ends: those that first and last cover
    led: those of searched and manual that only complete a group -> name of the linear that brought them in
    notes: lines for the user
    """

    searched: tuple[str, ...]
    manual: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    led: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def every(self) -> frozenset[str]:
        """All linears that go to BF16."""
        return frozenset((*self.searched, *self.manual, *self.ends))


def main(argv: Sequence[str]) -> int:
    """Search, print what each BF16 linear costs, and write the recipe; returns 0.

    Raises:
        ConfigError: an argument does not fit, no linear is quantised, the budget needs more than max_fraction, or the
            file exists.
    """
    arguments, config, assembly, calibration = set_up(argv, SearchArguments, "search", f"{__doc__}\n")
    out = arguments.out or DEFAULT_OUT
    check_out(out, "search")
    manual = matching(arguments.manual, calibration.candidates)
    ends = end_layers(calibration.candidates, list(calibration.linears), arguments.first, arguments.last)
    needs_gradients = arguments.metric in NEEDS_GRADIENTS
    order = ranked(calibration.measure(gradients=needs_gradients, progress=show_progress), arguments.metric)
    high = calibration.loss(dict.fromkeys(calibration.candidates, BF16))

    def loss_gap(kept: frozenset[str]) -> float:
        return calibration.loss(dict.fromkeys(kept, BF16)) - high

    choice = choose(arguments, order, calibration.candidates, manual, ends, loss_gap)
    scores = {linear.fqn: score for linear, score in order}
    recipe = searched_recipe(assembly.recipe, choice, list(calibration.linears), arguments)
    write_file(out, recipe.text)
    gaps = loss_gap(choice.every), loss_gap(frozenset())
    sys.stdout.write(
        headline(arguments, config, assembly, calibration)
        + "".join(f"{line}\n" for line in choice.notes)
        + cost_table(assembly.report, choice, scores, arguments.metric)
        + f"calibration loss: {gap_words(*gaps, assembly.recipe.name, calibration.tokens)}\n"
        + f"{out}: recipe of {len(choice.every)} of {len(calibration.candidates)} linears in BF16; use recipe={out}\n"
    )
    return 0


def choose(
    arguments: SearchArguments,
    order: Sequence[tuple[LinearSensitivity, float]],
    candidates: Sequence[str],
    manual: Sequence[str] = (),
    ends: Sequence[str] = (),
    loss_gap: Callable[[frozenset[str]], float] = lambda kept: 0.0,
) -> Choice:
    """Decide what goes to BF16.

    Args:
        order: linears by rank, the most sensitive first.
        candidates: linears that the recipe quantises, in the order of the model.
        manual, ends: go to BF16 whatever their rank, and do not count towards a level.
        loss_gap: calibration loss above BF16 if these linears are in BF16; for a budget.

    Raises:
        ConfigError: a budget needs more than max_fraction of the linears.
    """
    groups = {fqn: group for group in input_groups(candidates) for fqn in group}
    named = _closed(manual, groups)
    fixed = named | set(ends)
    rest = [linear.fqn for linear, _ in order if linear.fqn not in fixed]
    firsts = [fqn for number, fqn in enumerate(rest) if not set(groups[fqn]) & set(rest[:number])]  # of each group
    notes: list[str] = []
    if arguments.level is not None:
        count = int(arguments.level[1:])
        if count > len(rest):
            notes.append(
                f"level {arguments.level} exceeds the {len(rest)} linears that are left to choose: all of them"
            )
        leaders = rest[:count]
    elif arguments.fraction is not None:
        leaders = _within(firsts, groups, fixed, int(arguments.fraction * len(candidates) + 1e-9))
    else:
        leaders = _within_budget(arguments, firsts, groups, fixed, len(candidates), loss_gap, notes)
    chosen = _closed(leaders, groups) - fixed
    searched = tuple(fqn for fqn in candidates if fqn in chosen)
    in_order = tuple(fqn for fqn in candidates if fqn in named)
    led = _led(searched, leaders, groups) | _led(in_order, manual, groups)
    return Choice(searched=searched, manual=in_order, ends=tuple(ends), led=led, notes=tuple(notes))


def _led(chosen: Sequence[str], leaders: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Of the linears that are none of the leaders: name of the first leader that reads their input."""
    others = [fqn for fqn in chosen if fqn not in leaders]
    return {fqn: next(lead for lead in leaders if lead in groups[fqn]).rpartition(".")[2] for fqn in others}


def _closed(paths: Sequence[str], groups: Mapping[str, Sequence[str]]) -> set[str]:
    """The linears with all that read the same inputs."""
    return {mate for fqn in paths for mate in groups[fqn]}


def _within(firsts: Sequence[str], groups: Mapping[str, Sequence[str]], fixed: set[str], limit: int) -> list[str]:
    """Of the groups, by rank, those with which at most `limit` linears are in BF16; larger ones are passed."""
    leaders: list[str] = []
    for fqn in firsts:
        if len(_closed([*leaders, fqn], groups) | fixed) <= limit:
            leaders.append(fqn)
    return leaders


def _within_budget(
    arguments: SearchArguments,
    firsts: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    fixed: set[str],
    total: int,
    loss_gap: Callable[[frozenset[str]], float],
    notes: list[str],
) -> list[str]:
    """Of the groups, by rank, the fewest whose loss is within the budget: binary search on their number."""
    assert arguments.loss_budget is not None, "one of the three is given"
    low, high = 0, len(firsts)  # all in BF16 is within any budget
    while low < high:
        middle = (low + high) // 2
        gap = loss_gap(frozenset(_closed(firsts[:middle], groups) | fixed))
        notes.append(f"with {middle} of {len(firsts)} groups in BF16 the loss is {gap:+.2e} nats above BF16")
        low, high = (low, middle) if gap <= arguments.loss_budget else (middle + 1, high)
    share = len(_closed(firsts[:low], groups) | fixed) / total
    if share > arguments.max_fraction:
        raise ConfigError(
            f"loss_budget: got {arguments.loss_budget}; needs {share:.0%} of the linears in BF16, more than "
            f"max_fraction={arguments.max_fraction:g}. Raise max_fraction or loss_budget."
        )
    return list(firsts[:low])


def matching(patterns: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """The candidates that the paths or globs name.

    Raises:
        ConfigError: one names none; the nearest are named.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(fqn, pattern) for fqn in candidates):
            near = ", ".join(nearest_paths(pattern, candidates))
            raise ConfigError(f"manual: {pattern!r} names no quantised linear; nearest: {near}. Correct it.")
    return [fqn for fqn in candidates if any(fnmatch.fnmatchcase(fqn, pattern) for pattern in patterns)]


def end_layers(candidates: Sequence[str], linears: Sequence[str], first: int, last: int) -> list[str]:
    """Candidates in the first and last layers of their stack.

    Raises:
        ConfigError: there are not so many layers.
    """
    positions = layer_positions(linears)
    depth = max((place[1] for place in positions.values() if place is not None), default=0)
    for name, number in (("first", first), ("last", last)):
        if number > depth:
            raise ConfigError(f"search: {name} is {number}; the model has {depth} layers. Lower it.")
    places = {fqn: place for fqn in candidates if (place := positions[fqn]) is not None}
    return [fqn for fqn, (index, count) in places.items() if index < first or index >= count - last]


def searched_recipe(base: Recipe, choice: Choice, linears: Sequence[str], arguments: SearchArguments) -> Recipe:
    """The base recipe with rules before its own that put the chosen linears in BF16."""
    rules: list[dict[str, Any]] = [
        {"match": _pattern(fqn, linears), "use": "bf16"} for fqn in (*choice.manual, *choice.searched)
    ]
    rules += [{"layers": f"{end}:{n}", "use": "bf16"} for end in ("first", "last") if (n := getattr(arguments, end))]
    positions = layer_positions(linears)
    taken = choice.every | {*end_layers(linears, linears, arguments.first, arguments.last)}
    others = [fqn for fqn in linears if fqn not in taken]
    deciding = {next(rule for rule in base.rules if rule.covers(fqn, positions[fqn])).number for fqn in others}
    # a rule that has nothing left to decide would be refused
    kept = [
        written if rule.number in deciding else {**written, "optional": True}
        for rule, written in zip(base.rules, base.document["rules"], strict=True)
        if written not in rules
    ]
    description = f"search {_how(arguments)} by {arguments.metric} on {base.name}: {len(choice.every)} to BF16"
    document = base.document | {"description": description, "rules": [*rules, *kept]}
    keys = ("version", "description", *(key for key in base.document if key not in ("version", "description")))
    return load_recipe({key: document[key] for key in keys})


def _pattern(fqn: str, linears: Sequence[str]) -> str:
    """A glob that also finds the linear where the model is wrapped (model.layers.3...), if it is unambiguous."""
    wide = f"*{fqn}"
    return wide if [path for path in linears if fnmatch.fnmatchcase(path, wide)] == [fqn] else fqn


def cost_table(report: ConversionReport, choice: Choice, scores: Mapping[str, float], metric: str) -> str:
    """What each linear costs that goes to BF16: share of the linears' FLOPs, time, weight copies, saved input.

    A linear that manual names and first or last covers is one line, that of manual.
    """
    rows = {row.fqn: row for row in report.rows}
    total = sum(len(GEMMS) * row.out_features * row.in_features for row in report.rows)
    head = ["to BF16", "why", metric, "FLOPs %", "time % <=", "weight copies", "saved input a token"]
    lines, sums = [head], [0.0, 0.0, 0.0]
    inputs = saved_inputs(report, choice.every)
    named = {*choice.manual, *choice.searched}
    ends = [fqn for fqn in choice.ends if fqn not in named]
    for why, paths in (("manual", choice.manual), ("rank", choice.searched), ("first/last", ends)):
        for fqn in paths:
            row = rows[fqn]
            high = dataclasses.replace(row, numbers=BF16)
            gemms = sum(row.planned(gemm) == "fp8" for gemm in GEMMS)
            share = 100 * gemms * row.out_features * row.in_features / total
            copies = high.code_bytes + high.scale_bytes - row.code_bytes - row.scale_bytes
            # FP8 tensor cores have twice the peak of BF16 ones, so a linear takes at most half its BF16 time longer
            costs = [share, share / 2, copies]
            sums = [a + b for a, b in zip(sums, costs, strict=True)]
            cells = [f"{share:.2f}", f"{share / 2:.2f}", _bytes(copies), _bytes(inputs[fqn])]
            cause = f"with {choice.led[fqn]}" if fqn in choice.led else why
            lines.append([fqn, cause, f"{scores[fqn]:.3g}", *cells])
    total_inputs = sum(inputs.values())
    lines.append(["in all", "", "", f"{sums[0]:.2f}", f"{sums[1]:.2f}", _bytes(sums[2]), _bytes(total_inputs)])
    return align(lines, right=head[2:]) + "\n(time: of the linears in BF16, where FP8 runs at twice its speed)\n"


def saved_inputs(report: ConversionReport, kept: Collection[str]) -> dict[str, int]:
    """Bytes a token that backward keeps more of the inputs of these linears in BF16; what one saves, may be below 0.

    Linears that read one input keep it once in each of the precisions that they read it in; the first of them that
    moves answers for all.
    """
    rows = {row.fqn: row for row in report.rows}

    def held(group: Sequence[str], moved: bool) -> int:
        numbers = [BF16 if moved and fqn in kept else rows[fqn].numbers or BF16 for fqn in group]
        copies = {precision.wgrad.right or precision.high for precision in numbers}
        sizes = [copy.itemsize if isinstance(copy, torch.dtype) else 1 for copy in copies]
        return sum(sizes) * rows[group[0]].in_features

    more = dict.fromkeys(kept, 0)
    for group in input_groups(rows):
        first = next((fqn for fqn in group if fqn in kept), None)
        if first is not None:
            more[first] = held(group, True) - held(group, False)
    return more


def gap_words(searched: float, base: float, name: str, tokens: int) -> str:
    """Both calibration losses less that of BF16, and whether the search did not lower it."""
    worse = "" if searched < base else " (not better)"
    return f"searched {searched:+.1e}, {name} {base:+.1e} nats above BF16 on {tokens:,} tokens{worse}"


def _bytes(size: float) -> str:
    return f"{'-' if size < 0 else '+'}{bytes_text(abs(size))}"


def _how(arguments: SearchArguments) -> str:
    if arguments.level is not None:
        return arguments.level
    if arguments.fraction is not None:
        return f"fraction {arguments.fraction:g}"
    return f"loss budget {arguments.loss_budget:g}"


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
