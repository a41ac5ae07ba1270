"""What a recipe may ask for beside rules: a schedule of precisions, an alarm, remedies for outliers of SwiGLU."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fp8train.errors import RecipeError, one_of
from fp8train.recipe_document import mapping, string

ALARM_CAUSES = ("nonfinite", "spike")
ALARM_ACTIONS = ("demote",)
DOWN_PROJECTIONS = "*down_proj"
_ALARM_KEYS = ("on", "do", "spike_nats", "window", "at_most")
_SWIGLU_KEYS = ("clamp", "smooth", "match")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulePart:
    """From a point of training on, linears whose rule quantises them compute in another precision.

    Args:
        at: share of the run's steps that come before, 0 < at < 1.
        use: name of the precision.
    """

    at: float
    use: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """When a run undoes steps and takes a linear out of FP8.

    Args:
        on: causes: "nonfinite" (a step whose loss or gradient is not finite), "spike" (a loss that has risen too far).
        do: "demote": the worst linear, with those that share its input, goes to BF16; back to the last checkpoint.
        spike_nats: a loss is a spike here when it exceeds the mean of the last `window` by more than this, at once or
            over several steps; the black box's (fp8train/spikes.py) is one step that is unusual for its run.
        window: steps; there is no spike before so many steps.
        at_most: demotions in one run; after that the alarm is silent.
    """

    on: tuple[str, ...]
    do: str = "demote"
    spike_nats: float = 1.0
    window: int = 16
    at_most: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SwigluRemedy:
    """What is done to the SwiGLU product before down_proj reads it, where down_proj is quantised.

    Args:
        clamp: largest magnitude; None leaves it as it is.
        smooth: scale its channels to alike size by powers of two and the columns of down_proj's weight inversely.
        match: glob on the module path of the down projections.
    """

    clamp: float | None = None
    smooth: bool = False
    match: str = DOWN_PROJECTIONS

    def covers(self, fqn: str) -> bool:
        """Whether the linear at this path is treated."""
        return fnmatch.fnmatchcase(fqn, self.match)


def parse_schedule(value: object, precisions: Collection[str], source: str) -> tuple[SchedulePart, ...]:
    """`schedule:` of a recipe.

    Raises:
        RecipeError: it is not a list of {at, use} with rising `at`, or names a precision that there is not.
    """
    where = f"{source}: schedule"
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where} is {value!r}; needs a list such as [{{at: 0.9, use: bf16}}]. Correct or delete it.")
    parts: list[SchedulePart] = []
    for number, entry in enumerate(value, start=1):
        here = f"{where} entry {number}"
        document = mapping(entry, here, ("at", "use"))
        at = _number(document.get("at"), f"{here}: at", above=0, below=1)
        if parts and at <= parts[-1].at:
            raise RecipeError(f"{here}: at is {at:g} after {parts[-1].at:g}; needs a larger number. Sort the entries.")
        use = document.get("use")
        if not isinstance(use, str) or use not in precisions:
            raise RecipeError(f"{here}: use is {use!r}; {one_of(str(use), list(precisions))}. Correct it.")
        parts.append(SchedulePart(at=at, use=use))
    return tuple(parts)


def parse_alarm(value: object, source: str) -> Alarm:
    """`alarm:` of a recipe.

    Raises:
        RecipeError: a key, cause or number does not fit.
    """
    where = f"{source}: alarm"
    # YAML 1.1 reads a bare `on` as true
    if isinstance(value, dict) and True in value:
        value = {("on" if key is True else key): inner for key, inner in value.items()}
    document = mapping(value, where, _ALARM_KEYS)
    causes = document.get("on", list(ALARM_CAUSES))
    if not isinstance(causes, list) or not causes or any(cause not in ALARM_CAUSES for cause in causes):
        raise RecipeError(f"{where}: on is {causes!r}; needs a list of {' and '.join(ALARM_CAUSES)}. Correct it.")
    do = document.get("do", ALARM_ACTIONS[0])
    if do not in ALARM_ACTIONS:
        raise RecipeError(f"{where}: do is {do!r}; needs {', '.join(ALARM_ACTIONS)}. Correct it.")
    usual = Alarm(on=ALARM_CAUSES)
    return Alarm(
        on=tuple(cause for cause in ALARM_CAUSES if cause in causes),
        do=do,
        spike_nats=_number(document.get("spike_nats", usual.spike_nats), f"{where}: spike_nats", above=0),
        window=_count(document.get("window", usual.window), f"{where}: window"),
        at_most=_count(document.get("at_most", usual.at_most), f"{where}: at_most"),
    )


def parse_swiglu(value: object, source: str) -> SwigluRemedy:
    """`swiglu:` of a recipe.

    Raises:
        RecipeError: a key or value does not fit, or nothing is asked for.
    """
    where = f"{source}: swiglu"
    document = mapping(value, where, _SWIGLU_KEYS)
    clamp, smooth = document.get("clamp"), document.get("smooth", False)
    if not isinstance(smooth, bool):
        raise RecipeError(f"{where}: smooth is {smooth!r}; needs true or false. Correct it.")
    if clamp is None and not smooth:
        raise RecipeError(f"{where} asks for nothing; needs clamp: NUMBER or smooth: true. Correct or delete it.")
    limit = None if clamp is None else _number(clamp, f"{where}: clamp", above=0)
    match = string(document.get("match", DOWN_PROJECTIONS), f"{where}: match", "a glob in quotes")
    return SwigluRemedy(clamp=limit, smooth=smooth, match=match)


def options_document(
    schedule: Sequence[SchedulePart], alarm: Alarm | None, swiglu: SwigluRemedy | None
) -> dict[str, Any]:
    """The canonical document of what was asked for: nothing that was not, every value that has an effect."""
    document: dict[str, Any] = {}
    if schedule:
        document["schedule"] = [{"at": part.at, "use": part.use} for part in schedule]
    if alarm is not None:
        document["alarm"] = {"on": list(alarm.on), "do": alarm.do, "at_most": alarm.at_most}
        if "spike" in alarm.on:
            document["alarm"] |= {"spike_nats": alarm.spike_nats, "window": alarm.window}
    if swiglu is not None:
        document["swiglu"] = {"clamp": swiglu.clamp} if swiglu.clamp is not None else {}
        document["swiglu"] |= {"smooth": True} if swiglu.smooth else {}
        document["swiglu"] |= {"match": swiglu.match} if swiglu.match != DOWN_PROJECTIONS else {}
    return document


def _number(value: object, where: str, *, above: float, below: float | None = None) -> float:
    limit = "" if below is None else f" and below {below:g}"
    hint = f": YAML 1.1 takes it for text, {float(str(value)):.1e} for a number" if _is_numeric_text(value) else ""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < (below or float("inf")):
        raise RecipeError(f"{where} is {value!r}; needs a number above {above:g}{limit}. Correct it{hint}.")
    return float(value)


def _is_numeric_text(value: object) -> bool:
    """Such as "1e30", which has no point."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _count(value: object, where: str) -> int:
    if type(value) is not int or value < 1:
        raise RecipeError(f"{where} is {value!r}; needs a whole number, at least 1. Correct it.")
    return value
