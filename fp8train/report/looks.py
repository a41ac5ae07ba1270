"""How often a comparison was looked at. Each tested verdict is one more chance to be wrong: tests of a level alpha each
err with at most the sum of their levels together (Bonferroni), whatever made one look again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fp8train.report.statistics import ALPHA

Look = Mapping[str, Any]
SAME = ("seeds", "steps", "margin_percent")  # what two verdicts that are one look share


def looks_made(verdict: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every look at a comparison so far: `seeds` (how many), `steps`, `margin_percent`, `alpha` of each test.

    Args:
        verdict: of this look, with its comparisons.
        earlier: those of looks before; they count where they were at the same two arms.
    """
    looks: dict[tuple[Any, ...], dict[str, Any]] = {}
    for other in earlier:
        if all(other.get(key) == verdict[key] for key in ("baseline", "primary")):
            former = other.get("looks")
            former = looks_made({**other, "alpha": ALPHA}, ()) if former is None else former
            looks |= {tuple(look[key] for key in SAME): dict(look) for look in former}
    test = verdict["comparisons"][verdict["primary"]]["test"]
    if test["sd"] is not None and test["status"] != "undecided":  # else nothing was tested
        steps = max(run["steps"] for run in verdict["arms"][verdict["baseline"]]["runs"])
        look = {"seeds": len(verdict["seeds"]), "steps": steps, "margin_percent": verdict["margin_percent"]}
        before = looks.get(tuple(look.values()), {}).get("alpha", 0.0)
        looks[tuple(look.values())] = look | {"alpha": max(before, verdict["alpha"])}
    return list(looks.values())


def looks_words(looks: Sequence[Look]) -> list[str]:
    """What more looks than were planned make of the verdict, in one sentence; none where they keep to 5 %."""
    errs = sum(look["alpha"] for look in looks)
    if errs <= ALPHA * (1 + 1e-9):
        return []
    return [
        f"This is look {len(looks)} at these arms: its answer and those before it are wrong with up to "
        f"{100 * min(errs, 1.0):.3g} % together, not {100 * ALPHA:g} %."
    ]
