"""What the baseline of a comparison learned, and whether that is enough for the margin to mean anything.

An arm that learned nothing ends above the baseline by all that the baseline's loss fell. Where that is no more than
the margin, such an arm is equivalent as well, and so is every other: the comparison says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fp8train.report.conclusion import HELD_OUT, TRAINING
from fp8train.report.statistics import interval
from fp8train.units import count_text, loss_text, signed_text

LEAST_FALL = 10.0  # in margins: an arm within the margin has then kept at least nine tenths of what was learned
# 1 / (1 - beta2) at the default of optim.betas: until its second moment is a mean over as many steps, an update of
# Adam is close to the sign of the gradient, which hides rounding; after one step it is exactly that.
LEAST_STEPS = 20


def learning(label: str, runs: Sequence[Mapping[str, Any]], margin_percent: float) -> dict[str, Any]:
    """By how much the baseline's loss fell over the run, over all seeds: the held-out loss where it was scored before
    the first step too, else from the training loss of the first logged step.

    Args:
        label: the baseline's name for people.
        runs: its measures, one a seed, as verdict.json has them.
        margin_percent: of the loss at the end.

    Returns:
        quantity: the loss at the end, held-out where there is one; steps, tokens_seen: of the shortest run; start, end,
        fell: mean losses and their difference in nats per token, low, high, confidence: the interval of `fell` (None
        for one seed); margin: in nats; needed: what `fell`, or where there is one `low`, must reach, LEAST_FALL
        margins; in_short, doubt: why that says too little, in a few words and in full (None where it is enough);
        scope: a sentence with steps, tokens and fall. Numbers are None where a loss is not finite.
    """
    held_out = all(run["eval_loss"] is not None for run in runs)
    scored = held_out and all(run["first_eval_loss"] is not None for run in runs)
    first, last = "first_eval_loss" if scored else "first_train_loss", "eval_loss" if held_out else "train_loss_ema"
    losses = [(run[first], run[last]) for run in runs]
    steps, tokens = (min((run[key] for run in runs), key=lambda value: value or 0) for key in ("steps", "tokens_seen"))
    found: dict[str, Any] = {"quantity": HELD_OUT if held_out else TRAINING, "steps": steps, "tokens_seen": tokens}
    over = f"{count_text(steps)} step{'s' * (steps != 1)} ({count_text(tokens)} tokens)"
    if any(start is None or end is None for start, end in losses):
        unknown = f"what {label} learned is unknown, since a loss of it is not finite"
        nothing = dict.fromkeys(("start", "end", "fell", "low", "high", "confidence", "margin", "needed"))
        scope = f"Over {over} {unknown}."
        return {**found, **nothing, "in_short": unknown, "doubt": f"{unknown}; repeat the runs", "scope": scope}
    start, end = (sum(column) / len(runs) for column in zip(*losses, strict=True))
    fall = interval([first - last for first, last in losses])
    margin = margin_percent / 100 * end
    found |= {"start": start, "end": end, "fell": fall.mean, "low": fall.low, "high": fall.high}
    found |= {"confidence": fall.confidence, "margin": margin, "needed": LEAST_FALL * margin}
    found |= dict.fromkeys(("in_short", "doubt")) | _doubt(label, found, margin_percent)
    quantity = found["quantity"]
    begun = "before the first step" if scored else f"at the first logged step{' (training loss)' * held_out}"
    ends = f"from {loss_text(start)} {begun} to {loss_text(end)} at the end ({quantity})"
    return {**found, "scope": f"Over {over} {label}'s loss {_moved(fall.mean)} nats per token, {ends}."}


def _doubt(label: str, found: Mapping[str, Any], margin_percent: float) -> dict[str, str]:
    """`in_short` and `doubt` of `learning`; nothing where the baseline learned enough."""
    if (found["fell"] if found["low"] is None else found["low"]) < found["needed"]:
        fell = f"{label}'s loss {_moved(found['fell'], 'only ')} nats per token"
        spread = ""
        if found["low"] is not None:
            edges = " to ".join(signed_text(found[edge]) for edge in ("low", "high"))
            spread = f" ({100 * found['confidence']:.0f} % interval {edges})"
        open_mean = spread if found["fell"] >= found["needed"] else ""  # where the mean alone would be enough
        margin = f"{found['margin']:.4f} ({margin_percent:g} %)"
        needed = f"it must fall by {found['needed']:.4f}, {LEAST_FALL:g} times the margin of {margin}"
        fell_at_all = found["fell"] >= 0  # a run that unlearns does not want more of it
        why = f"or an arm within the margin may have lost more than {100 / LEAST_FALL:.0f} % of what was learned"
        return {
            "in_short": f"{fell}{open_mean} and the margin is {margin}",
            "doubt": f"{fell}{spread}; {needed}, {why}; {'train for more steps' if fell_at_all else 'lower optim.lr'}",
        }
    if found["steps"] < LEAST_STEPS:
        few = f"{count_text(found['steps'])} step{'s' * (found['steps'] != 1)} cannot tell the arms apart"
        why = f"Adam's first updates hide rounding, and a verdict needs {LEAST_STEPS}; train for more steps"
        return {"in_short": few, "doubt": f"{few}: {why}"}
    return {}


def _moved(fall: float, sparing: str = "") -> str:
    """`fell by 3.5687`; of a loss that rose `rose by 0.0100`."""
    return f"fell by {sparing}{loss_text(fall)}" if fall >= 0 else f"rose by {loss_text(-fall)}"
