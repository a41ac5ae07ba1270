"""Which precision every linear has at a step: its rule's, the schedule's, or BF16 after a demotion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torch import nn

from fp8train.backends.coverage import COUNTS
from fp8train.checkpoint import Checkpoint
from fp8train.errors import RecipeError
from fp8train.nn.weights import named_linears
from fp8train.quant.formats import BF16, LinearPrecision
from fp8train.recipe import Recipe


class PrecisionControl:
    """Sets the precision of the converted linears of a model as training goes on; a function of step and demotions.

    Args:
        model: converted; the precisions that it has are those of the rules.
        recipe: its schedule is followed.
        steps: of the whole run.

    Raises:
        RecipeError: it has a schedule, and no rule that quantises, so that the schedule would change nothing.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int) -> None:
        self.linears = named_linears(model)
        self._rules = {fqn: linear.precision for fqn, linear in self.linears.items()}
        self._recipe = recipe
        # as the document has it: 0.55 of 100 steps are 55, of which the binary number is a little more
        shares = [(Fraction(repr(part.at)), part.use) for part in recipe.schedule]
        self._parts = [(math.ceil(share * steps) + 1, use) for share, use in shares]
        self.demoted: dict[str, str] = {}  # module path: when and why
        if recipe.schedule and not any(precision.quantized for precision in self._rules.values()):
            raise RecipeError(
                f"{recipe.name}: schedule changes none of the {len(self._rules)} linears, since a rule's bf16 or fp32 "
                "stays; needs a rule that quantises. Give FP8 in a rule and bf16 in the schedule's first part."
            )

    def scheduled(self, step: int) -> str | None:
        """Name of the precision that the schedule has put in place of the rules' at a step (from 1), or None."""
        begun = self._begun(step)
        return begun[-1][1] if begun else None

    def _begun(self, step: int) -> list[tuple[int, str]]:
        """The schedule's precisions up to a step, each with its first step: that with at * steps steps behind it."""
        return [part for part in self._parts if part[0] <= step]

    def precision(self, fqn: str, step: int) -> LinearPrecision:
        """What a linear computes with at a step. A rule's bf16 or fp32 stays, whatever the schedule says."""
        own, name = self._rules[fqn], self.scheduled(step)
        if not own.quantized:
            return own
        scheduled = own if name is None else self._recipe.precisions[name]
        return BF16 if fqn in self.demoted and scheduled.quantized else scheduled

    def change(self, fqn: str, step: int) -> str | None:
        """What has changed a linear's precision up to a step, in words, or None."""
        if not self._rules[fqn].quantized:
            return None
        parts = [f"{name} from step {first}" for first, name in self._begun(step)]
        schedule = [f"the schedule: {', '.join(parts)}"] if parts else []
        return "; ".join([*schedule, *([self.demoted[fqn]] if fqn in self.demoted else [])]) or None

    def apply(self, step: int) -> int:
        """Set every linear to what it has at a step, and tell the coverage of it; gives the number that changed."""
        changed = 0
        for fqn, linear in self.linears.items():
            COUNTS.change(linear.site, self.change(fqn, step))
            wanted = self.precision(fqn, step)
            if linear.precision != wanted:
                linear.set_precision(wanted)
                changed += 1
        return changed


def follow_run(model: nn.Module, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Give a converted model the precisions that the run had at a checkpoint: schedule and demotions included."""
    control = PrecisionControl(model, recipe, checkpoint.config.steps)
    control.demoted = demoted_linears(checkpoint)
    control.apply(checkpoint.step)


def demoted_linears(checkpoint: Checkpoint) -> dict[str, str]:
    """Module paths of the linears that alarms had put in BF16, each with when and why."""
    return demotions(checkpoint.state.progress.get("watchers", {}).get("alarm", {}))


def demotions(state: Mapping[str, Any]) -> dict[str, str]:
    """Those in the state of an alarm; older checkpoints name the linears alone."""
    saved = state.get("demoted", {})
    return dict(saved) if isinstance(saved, Mapping) else dict.fromkeys(saved, "an alarm put it in BF16")
