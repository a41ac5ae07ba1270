"""Recipe documents: which numbers each linear of a model computes with. recipes/README.md describes the format."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import os.path
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fp8train._layout import folder
from fp8train.errors import RecipeError, one_of
from fp8train.quant.formats import BF16, FP32, GemmPrecision, LinearPrecision, QuantSpec
from fp8train.recipe_document import mapping, read_yaml, string
from fp8train.recipe_options import (
    Alarm,
    SchedulePart,
    SwigluRemedy,
    options_document,
    parse_alarm,
    parse_schedule,
    parse_swiglu,
)

VERSION = 1
BUILT_IN: dict[str, LinearPrecision] = {"bf16": BF16, "fp32": FP32}
OPERANDS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}  # left, right of each GEMM

_TOP_KEYS = ("version", "description", "precisions", "rules", "optimizer", "schedule", "alarm", "swiglu")
_RULE_KEYS = ("match", "layers", "use", "optional")
_LAYERS = re.compile(r"(first|last):([1-9]\d*)")
_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?=\.|$)")
_OTHER_NAME = "other_name"

Position = tuple[int, int]  # (index, number of layers) in a stack of decoder layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule of a recipe: the linears that it covers, and the precision that it gives them.

    Args:
        number: place in the recipe, from 1.
        selector: a glob on the whole module path ("*" spans dots too), "re:" and a regular expression for all of it, or
            "layers first:N" / "layers last:N".
        use: name of a precision.
        optional: the rule may match nothing.
        regex: the selector compiled; None for layers.
        layers: ("first" | "last", N); None for a pattern.
    """

    number: int
    selector: str
    use: str
    optional: bool = False
    regex: re.Pattern[str] | None = field(default=None, compare=False)
    layers: tuple[str, int] | None = None

    def __str__(self) -> str:
        return f"rule {self.number} {self.selector!r}"

    def covers(self, fqn: str, position: Position | None) -> bool:
        """Whether the rule selects the module `fqn`, which lies at `position` of its stack of layers."""
        if self.regex is not None:
            return self.regex.fullmatch(fqn) is not None
        if self.layers is None or position is None:
            return False
        end, count = self.layers
        index, num_layers = position
        return index < count if end == "first" else index >= num_layers - count

    def names(self, fqn: str) -> bool:
        """Whether the rule speaks of this very module: another last component in the path would not match."""
        parent, _, _ = fqn.rpartition(".")
        other = f"{parent}.{_OTHER_NAME}" if parent else _OTHER_NAME
        return self.regex is not None and self.regex.fullmatch(other) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a recipe decided for one linear: the precision, the rule ("2: *layers.*"), and the reason in words."""

    precision: LinearPrecision
    rule: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A checked recipe document.

    Args:
        name: file stem; "custom" for a mapping.
        source: what error messages call it, e.g. "blockwise.yaml".
        document: the document in canonical form: every operand with its scale, defaults left out.
        precisions: those of the document and the built-in bf16 and fp32, by name.
        rules: in order; the first that covers a linear decides.
        moments: dtype of the AdamW moments that the recipe asks for.
        schedule: precisions that take over in the course of a run, in order.
        alarm: what a run does when it diverges; None: nothing.
        swiglu: what is done to the input of down projections; None: nothing.
    """

    name: str
    source: str
    document: dict[str, Any]
    precisions: dict[str, LinearPrecision]
    rules: tuple[Rule, ...]
    moments: Literal["fp32", "bf16"] = "fp32"
    schedule: tuple[SchedulePart, ...] = ()
    alarm: Alarm | None = None
    swiglu: SwigluRemedy | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of what the document means: the order of rules counts, spelling and description do not."""
        meaning = {key: value for key, value in self.document.items() if key != "description"}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def text(self) -> str:
        """The canonical document as YAML. Loading it gives a recipe with the same hash."""
        return yaml.safe_dump(self.document, sort_keys=False, default_flow_style=None, width=120)

    def resolve(
        self,
        linears: Mapping[str, tuple[int, ...]],
        keep_high_precision: Mapping[str, str] | None = None,
        others: Mapping[str, str] | None = None,
    ) -> dict[str, Assignment]:
        """Decide the precision of every linear; the first rule that covers it wins.

        A linear that its model class keeps in high precision gets BF16 where the rule would quantise it, unless that
        rule names it: "*lm_head" names model.lm_head, while "*", "*model.*" and "layers" merely cover it (Rule.names).

        Args:
            linears: module path -> weight shape [N, K], or [E, N, K] for a grouped linear.
            keep_high_precision: module path -> who keeps it, e.g. {"lm_head": "Decoder.keep_high_precision"}.
            others: path of what holds matrices and is no linear -> what it is, for messages, e.g. "a Conv1D".

        Returns:
            dict[str, Assignment]: one for each linear, in their order.

        Raises:
            RecipeError: a rule that is not optional matches nothing, or only what earlier rules take and contradict; or
                a linear has no rule.
        """
        positions = layer_positions(linears)
        for rule in self.rules:
            self._check_matches(rule, positions, others or {})
            self._check_decides(rule, positions)
        kept = keep_high_precision or {}
        return {fqn: self._decide(fqn, positions[fqn], kept.get(fqn)) for fqn in linears}

    def _decide(self, fqn: str, position: Position | None, keeper: str | None) -> Assignment:
        rule = next((rule for rule in self.rules if rule.covers(fqn, position)), None)
        if rule is None:
            raise RecipeError(
                f"{self.source}: linear {fqn!r} has no rule; every linear needs one. "
                "End the rules with {match: '*', use: bf16} to keep the rest in BF16."
            )
        precision, label = self.precisions[rule.use], f"{rule.number}: {rule.selector}"
        if keeper is not None and precision.quantized and not rule.names(fqn):
            reason = f"{keeper} keeps it in BF16; {rule} covers it but does not name it"
            return Assignment(precision=BF16, rule=label, reason=reason)
        return Assignment(precision=precision, rule=label, reason=f"{rule} says {rule.use}")

    def _check_matches(self, rule: Rule, positions: Mapping[str, Position | None], others: Mapping[str, str]) -> None:
        """Refuse a rule that covers nothing; what earlier rules take away from it does not count."""
        if rule.layers is not None:
            num_layers = max((position[1] for position in positions.values() if position is not None), default=0)
            if 0 < num_layers < rule.layers[1]:
                raise RecipeError(
                    f"{self.source}: {rule} asks for {rule.layers[1]} layers; the model has {num_layers}. "
                    "Lower the number."
                )
        if rule.optional or rule.selector == "*" or any(rule.covers(fqn, place) for fqn, place in positions.items()):
            return
        other = next(
            (
                f"It matches {path!r}, {what}, but only an nn.Linear can be reached. "
                for path, what in others.items()
                if rule.covers(path, None)
            ),
            "",
        )
        near = ", ".join(nearest_paths(rule.selector, positions)) or "none"
        raise RecipeError(
            f"{self.source}: {rule} matches none of the {len(positions)} linears; needs at least one. "
            f"{other}Closest module paths: {near}. Correct the rule, delete it, or add 'optional: true'."
        )

    def _check_decides(self, rule: Rule, positions: Mapping[str, Position | None]) -> None:
        """Refuse a rule all of whose linears earlier rules take, some of them with another precision."""
        covered = [fqn for fqn, place in positions.items() if rule.covers(fqn, place)]
        if rule.optional or rule.selector == "*" or not covered:
            return
        first = [next(other for other in self.rules if other.covers(fqn, positions[fqn])) for fqn in covered]
        contrary = next((pair for pair in zip(covered, first, strict=True) if pair[1].use != rule.use), None)
        if rule in first or contrary is None:
            return
        raise RecipeError(
            f"{self.source}: {rule} says {rule.use} and decides no linear: earlier rules cover all that it matches, "
            f"and {contrary[1]} says {contrary[1].use} of {contrary[0]!r}. The first rule that matches decides: move "
            "it up, delete it, or add 'optional: true'."
        )


def layer_positions(paths: Iterable[str]) -> dict[str, Position | None]:
    """Place of each module in its stack of layers: (index, number of layers), or None outside any.

    The outermost "layers.3", "layer.3", "h.3", "blocks.3" or "block.3" of the path counts. What precedes the index is
    the stack, so that an encoder and a decoder are counted apart.
    """
    found = {path: _LAYER_INDEX.search(path) for path in paths}
    sizes: dict[str, int] = {}
    for path, hit in found.items():
        if hit is not None:
            stack = path[: hit.start(1)]
            sizes[stack] = max(sizes.get(stack, 0), int(hit[1]) + 1)
    return {path: None if hit is None else (int(hit[1]), sizes[path[: hit.start(1)]]) for path, hit in found.items()}


def nearest_paths(pattern: str, paths: Iterable[str]) -> list[str]:
    """The three module paths most like a pattern; of those that differ only in their indices, the first that is."""
    literal = re.sub(r"[*?\\^$()\[\]|+]", "", pattern.removeprefix("re:"))

    def likeness(path: str) -> float:
        names = [path, *path.split(".")]
        return max(difflib.SequenceMatcher(None, literal, name).ratio() for name in names)

    best: dict[str, tuple[float, str]] = {}
    for path in paths:
        kind, like = re.sub(r"\d+", "0", path), likeness(path)
        if kind not in best or like > best[kind][0]:
            best[kind] = like, path
    return [path for _, path in sorted(best.values(), key=lambda pair: (-pair[0], pair[1]))[:3]]


def available_recipes() -> list[str]:
    """Names of the recipes that come with fp8train."""
    return sorted(path.stem for path in folder("recipes").glob("*.yaml"))


def load_recipe(source: str | Path | Mapping[str, Any], *, name: str = "custom") -> Recipe:
    """Load and check a recipe.

    Args:
        source: name of a shipped recipe ("blockwise"), path of a YAML file (a Path, or text with a separator or ending
            in .yaml or .yml; ~ is the home folder), or the document as a mapping.
        name: of the recipe where source is a mapping; a file has its own.

    Raises:
        RecipeError: there is no such recipe, or the document is not a recipe; the message says where and the remedy.
    """
    if isinstance(source, Mapping):
        return _parse(source, name=name, source="recipe")
    if not isinstance(source, str | Path):
        raise RecipeError(f"recipe is {source!r}; needs a name, a path or a document. Give one, such as 'blockwise'.")
    path = Path(os.path.expanduser(source))
    if isinstance(source, str) and path.suffix not in (".yaml", ".yml") and path.name == source:
        path = folder("recipes") / f"{source}.yaml"
        if not path.is_file():
            known = one_of(source, available_recipes())
            raise RecipeError(f"recipe is {source!r}; {known}. Correct the name, or give the path of a YAML file.")
    return _parse(read_yaml(path), name=path.stem, source=path.name)


def _parse(document: object, *, name: str, source: str) -> Recipe:
    top = mapping(document, source, _TOP_KEYS)
    version = top.get("version")
    if type(version) is not int or version != VERSION:  # bool is an int, and 1.0 == 1
        raise RecipeError(f"{source}: version is {version!r}; needs {VERSION}. Write 'version: {VERSION}' on top.")
    canonical: dict[str, Any] = {"version": VERSION}
    if "description" in top:
        canonical["description"] = string(top["description"], f"{source}: description", "text")
    precisions = dict(BUILT_IN)
    for key, value in mapping(top.get("precisions", {}), f"{source}: precisions", None).items():
        where = f"{source}: precisions.{key}"
        if key in BUILT_IN:
            raise RecipeError(f"{where} is built in; needs a name other than {', '.join(BUILT_IN)}. Rename it.")
        precisions[key], canonical.setdefault("precisions", {})[key] = _parse_precision(key, value, where)
    rules = top.get("rules")
    if not isinstance(rules, list) or not rules:
        got = f"{source}: rules is {rules!r}"
        raise RecipeError(f"{got}; needs a list of at least one rule. Add {{match: '*', use: bf16}}.")
    parsed = tuple(_parse_rule(number, rule, precisions, source) for number, rule in enumerate(rules, start=1))
    canonical["rules"] = [_rule_document(rule) for rule in parsed]
    optimizer = mapping(top.get("optimizer", {}), f"{source}: optimizer", ("moments",))
    moments = optimizer.get("moments", "fp32")
    if moments not in ("fp32", "bf16"):
        raise RecipeError(f"{source}: optimizer.moments is {moments!r}; needs fp32 or bf16. Correct it.")
    if moments != "fp32":
        canonical["optimizer"] = {"moments": moments}
    schedule = parse_schedule(top["schedule"], precisions, source) if "schedule" in top else ()
    alarm = parse_alarm(top["alarm"], source) if "alarm" in top else None
    swiglu = parse_swiglu(top["swiglu"], source) if "swiglu" in top else None
    return Recipe(
        name=name,
        source=source,
        document=canonical | options_document(schedule, alarm, swiglu),
        precisions=precisions,
        rules=parsed,
        moments=moments,
        schedule=schedule,
        alarm=alarm,
        swiglu=swiglu,
    )


def _parse_precision(name: str, value: object, where: str) -> tuple[LinearPrecision, dict[str, Any]]:
    """A precision and its canonical document."""
    document = mapping(value, where, (*OPERANDS, "scale", "noise"))
    scale = document.get("scale", "pow2")
    if scale not in ("pow2", "fp32"):
        raise RecipeError(f"{where}.scale is {scale!r}; needs pow2 or fp32. Correct it.")
    gemms = dict.fromkeys(OPERANDS, GemmPrecision())
    canonical: dict[str, Any] = {}
    source = "dual"
    for gemm, operands in OPERANDS.items():
        if gemm not in document:
            continue
        entry = mapping(document[gemm], f"{where}.{gemm}", operands + (("source",) if gemm == "wgrad" else ()))
        source = entry.pop("source", source)
        if not entry:
            needs = f"needs {' or '.join(operands)}. Delete {gemm} to run it in BF16."
            raise RecipeError(f"{where}.{gemm} has no operand; {needs}")
        specs = {key: _parse_operand(text, scale, f"{where}.{gemm}.{key}") for key, text in entry.items()}
        gemms[gemm] = GemmPrecision(specs.get(operands[0]), specs.get(operands[1]))
        canonical[gemm] = {operand: str(specs[operand]) for operand in operands if operand in specs}
    noise = document.get("noise", 0.0)
    if isinstance(noise, bool) or not isinstance(noise, int | float):
        raise RecipeError(f"{where}.noise is {noise!r}; needs a number such as 0.0265. Correct it.")
    if noise:
        canonical["noise"] = float(noise)
    if not canonical:
        raise RecipeError(f"{where} has no GEMM; needs at least one of {', '.join(OPERANDS)}. Use bf16 in its place.")
    if source not in ("dual", "requant"):
        raise RecipeError(f"{where}.wgrad.source is {source!r}; needs dual or requant. Correct it.")
    if "x" in canonical.get("wgrad", {}):
        canonical["wgrad"]["source"] = source
    try:
        return LinearPrecision(name, **gemms, wgrad_source=source, noise=float(noise)), canonical  # type: ignore[arg-type]
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _parse_operand(value: object, scale: str, where: str) -> QuantSpec:
    text = string(value, where, "text such as 'e4m3 1x128'")
    try:
        return QuantSpec.parse(text, scale=scale)
    except ValueError as error:
        raise RecipeError(f"{where}: {error} Correct it, or leave the operand out to keep it in BF16.") from error


def _parse_rule(number: int, value: object, precisions: Mapping[str, LinearPrecision], source: str) -> Rule:
    where = f"{source}: rule {number}"
    document = mapping(value, where, _RULE_KEYS)
    if ("match" in document) == ("layers" in document):
        got = "both" if "match" in document else "neither"
        raise RecipeError(f"{where} has {got} of match and layers; needs one. Write match: 'GLOB' or layers: first:N.")
    use = document.get("use")
    if not isinstance(use, str) or use not in precisions:
        raise RecipeError(f"{where}: use is {use!r}; {one_of(str(use), list(precisions))}. Correct it.")
    optional = document.get("optional", False)
    if not isinstance(optional, bool):
        raise RecipeError(f"{where}: optional is {optional!r}; needs true or false. Correct it.")
    if "layers" in document:
        text = str(document["layers"])
        hit = _LAYERS.fullmatch(text)
        if hit is None:
            raise RecipeError(f"{where}: layers is {text!r}; needs first:N or last:N with N >= 1. Correct it.")
        layers = (hit[1], int(hit[2]))
        return Rule(number=number, selector=f"layers {text}", use=use, optional=optional, layers=layers)
    match = string(document["match"], f"{where}: match", "a glob in quotes, or 're:' and a regular expression")
    try:
        regex = re.compile(match[3:] if match.startswith("re:") else fnmatch.translate(match))
    except re.error as error:
        raise RecipeError(f"{where}: match is {match!r}; needs a regular expression after 're:' ({error}).") from error
    return Rule(number=number, selector=match, use=use, optional=optional, regex=regex)


def _rule_document(rule: Rule) -> dict[str, Any]:
    select = {"match": rule.selector} if rule.layers is None else {"layers": rule.selector.removeprefix("layers ")}
    return {**select, "use": rule.use, **({"optional": True} if rule.optional else {})}
