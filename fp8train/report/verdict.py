"""What the runs of one comparison say: loss gaps, speed and memory. Pure functions from run records to the content of
verdict.json.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fp8train.recipe import load_recipe
from fp8train.report import trajectory
from fp8train.report.comparable import MACHINE_FACTS, SPEED_FACTS, check_comparable, memory_doubt, speed_doubt
from fp8train.report.conclusion import (
    SPEED_KEYS,
    against_placebo,
    gap_test,
    mean,
    speed_ratios,
)
from fp8train.report.divergence import finished, judged
from fp8train.report.learning import learning
from fp8train.report.looks import looks_made
from fp8train.report.run_record import Arms, RunRecord
from fp8train.report.sentence import caveats, common_status, headline, numbers
from fp8train.report.statistics import ALPHA
from fp8train.report.trajectory import SMOOTHING, ema, heldout_gap
from fp8train.units import finite

BASELINES = ("bf16", "fp32")

# What a run that diverged has none of.
LOSSES = (
    "train_loss", "train_loss_ema", "eval_loss", "eval_loss_bf16", "bits_per_byte", "bits_per_byte_bf16",
)  # fmt: skip

# arm -> seed -> held-out loss of {"baseline_weights": baseline's weights in the arm's arithmetic, "arm_weights": the
# arm's weights in the baseline's}
Crossed = Mapping[str, Mapping[int, Mapping[str, float]]]


def measures(run: RunRecord) -> dict[str, Any]:
    """What one run reached: losses, speed, memory, share of FLOPs in FP8, what it ran on. None where a number is
    absent or not finite; no loss is that of a run that diverged.
    """
    speed, way = run.speeds, run.way
    low, median, high = np.percentile(speed, (10, 50, 90)).tolist() if len(speed) else (None, None, None)
    losses = run.train.columns["loss"]
    found = {
        "run_dir": str(run.path),
        "diverged": run.diverged,
        "steps": int(finite(run.result.get("steps")) or run.train.steps[-1]),
        "tokens_seen": finite(run.result.get("tokens_seen")) or run.train.last("tokens_seen"),
        "first_train_loss": next((loss for value in losses if (loss := finite(value)) is not None), None),
        "first_eval_loss": run.evals.first("eval_loss") if 0 in run.evals.steps else None,
        "train_loss": run.train.last("loss"),
        "train_loss_ema": finite(ema(losses)[-1]),
        "eval_loss": run.evals.last("eval_loss"),
        "eval_loss_bf16": run.evals.last("eval_loss_bf16"),
        "eval_losses": run.evals.last_of_sources(),
        "bits_per_byte": run.evals.last("bits_per_byte"),
        "bits_per_byte_bf16": run.evals.last("bits_per_byte_bf16"),
        "nonfinite_losses": int(np.count_nonzero(~np.isfinite(losses))),
        "spikes": trajectory.spikes(run.train),
        "damaged_lines": len(run.damaged),
        "skipped_steps": run.result.get("skipped_steps"),
        "timed_steps": len(speed),
        "tokens_per_second": median,
        "tokens_per_second_p10": low,
        "tokens_per_second_p90": high,
        "train_seconds": finite(run.result.get("train_seconds")),
        "peak_memory_bytes": finite(run.result.get("peak_memory_bytes")),
        "fp8_flops_share": finite(run.coverage.get("fp8_flops_share")),
        "backend": run.coverage.get("backend"),
        "emulates": run.emulates,
        "moved": _moved(run),
        "ran_on": {key: way.get(key) for key in SPEED_FACTS},
    }
    return found if run.diverged is None else found | dict.fromkeys(LOSSES) | {"eval_losses": {}}


def _moved(run: RunRecord) -> dict[str, list[Any]]:
    """Facts of MACHINE_FACTS that changed during a run -> their values in order; what was not recorded is no change."""
    places = run.places
    found = {key: [place[key] for place in places if place.get(key) is not None] for key in MACHINE_FACTS}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def pair_measures(
    baseline: RunRecord, other: RunRecord, base: Mapping[str, Any], new: Mapping[str, Any], crossed: Mapping[str, float]
) -> dict[str, Any]:
    """How one run differs from the baseline run of the same seed. Where one of them diverged there is no gap and no
    ratio of speeds: up to that step they may look alike.

    Args:
        base, new: `measures` of the two.
        crossed: the held-out losses of each one's weights in the other's arithmetic (Crossed).
    """
    diverged = bool(base["diverged"] or new["diverged"])
    if diverged:
        baseline, other = (
            dataclasses.replace(run, train=run.train.empty(), evals=run.evals.empty()) for run in (baseline, other)
        )
    speed = None if diverged else _ratio(new["tokens_per_second"], base["tokens_per_second"])
    tokens = trajectory.tokens_to_loss(baseline.train, other.train)
    return {
        "diverged": diverged,
        "relative_loss_error": trajectory.relative_loss_error(baseline.train, other.train),
        "heldout_gap": heldout_gap(baseline.evals, other.evals),
        "heldout_gap_bf16": heldout_gap(baseline.evals, other.evals, "eval_loss_bf16", "bits_per_byte_bf16"),
        "source_gaps": trajectory.source_gaps(baseline.evals, other.evals),
        "crossed": crossed_losses(base, new, crossed),
        "gap_slope": trajectory.gap_slope(baseline.train, other.train),
        "decay_gap": trajectory.decay_gap(baseline.train, other.train),
        "tokens_to_loss": tokens,
        "grad_norm_ratio": trajectory.grad_norm_ratio(baseline.train, other.train),
        "spikes_more": new["spikes"] - base["spikes"],
        "tokens_per_second_ratio": speed,
        "time_to_loss_ratio": _ratio(speed, tokens["common"]["ratio"]),
        "peak_memory_ratio": _ratio(new["peak_memory_bytes"], base["peak_memory_bytes"]),
    }


def crossed_losses(
    base: Mapping[str, Any], new: Mapping[str, Any], crossed: Mapping[str, float]
) -> dict[str, float | None]:
    """The 2x2 table of weights and arithmetic: are the arm's weights worse, or is its arithmetic?

    Returns:
        held-out losses `WEIGHTS_in_ARITHMETIC` for baseline and arm; weights_nats: what the arm's weights cost in the
        baseline's arithmetic; arithmetic_nats: what its arithmetic costs on the baseline's weights.
    """
    all_bf16 = base["eval_loss"] is not None and base["eval_loss"] == base["eval_loss_bf16"]
    table = {
        "baseline_in_baseline": base["eval_loss"],
        "baseline_in_arm": crossed.get("baseline_weights"),
        "arm_in_baseline": crossed.get("arm_weights", new["eval_loss_bf16"] if all_bf16 else None),
        "arm_in_arm": new["eval_loss"],
    }
    start, weights, arithmetic = table["baseline_in_baseline"], table["arm_in_baseline"], table["baseline_in_arm"]
    return {
        **table,
        "weights_nats": None if weights is None or start is None else weights - start,
        "arithmetic_nats": None if arithmetic is None or start is None else arithmetic - start,
    }


def make_verdict(
    arms: Arms,
    *,
    baseline: str,
    margin_percent: float,
    crossed: Crossed | None = None,
    parallel: int = 1,
    looks: int = 1,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The content of verdict.json.

    Args:
        arms: arm -> seed -> run; every arm has the same seeds.
        baseline: the arm that the others are held against.
        margin_percent: largest gap of the mean held-out loss that counts as equal.
        crossed: held-out losses of one arm's weights in another's arithmetic.
        parallel: runs that were trained at a time.
        looks: verdicts that are planned, which share the 5 % between them.
        earlier: verdict.json of earlier looks.

    Returns:
        status and reason: that of every judged arm (sentence.judged_arms), or "mixed" and each one's reason where they
        differ; primary: the first of them; sentence, numbers, caveats: the verdict in words (sentence.py), over all
        arms; arms: per arm label, noise and `runs` per seed; learning: the baseline's; comparisons: per other arm its
        `seeds`, their mean, the test with its own status and reason, the difference from the placebo and speed ratios
        (not_quoted: why no text has them), and the same of memory; shared: facts of each seed.

    Raises:
        ConfigError: the runs of a seed are not comparable (check_comparable).
    """
    seeds = sorted(arms[baseline])
    shared = {seed: check_comparable({arm: runs[seed] for arm, runs in arms.items()}) for seed in seeds}
    entries = {arm: _arm_entry(arm, runs, seeds) for arm, runs in arms.items()}
    others = [arm for arm in arms if arm != baseline]
    placebo = next((arm for arm in others if entries[arm]["noise"] == _placebo_noise()), None)
    verdict: dict[str, Any] = {
        "version": 4,
        **dict.fromkeys(("status", "reason", "sentence", "numbers", "caveats")),
        "primary": next((arm for arm in others if arm != placebo), placebo),
        "baseline": baseline,
        "placebo": placebo,
        "margin_percent": margin_percent,
        "alpha": ALPHA / looks,
        "looks": [],
        "seeds": seeds,
        "smoothing": SMOOTHING,
        "parallel": parallel,
        "arms": entries,
        "learning": learning(entries[baseline]["label"], finished(entries[baseline]["runs"]), margin_percent),
        "comparisons": {},
        "shared": [{"seed": seed, **facts} for seed, facts in shared.items()],
    }
    verdict["comparisons"] = _comparisons(arms, verdict, crossed or {})
    verdict["looks"] = looks_made(verdict, earlier)
    verdict |= common_status(verdict)
    verdict |= {"sentence": headline(verdict), "numbers": numbers(verdict), "caveats": caveats(verdict)}
    return verdict


def _comparisons(arms: Arms, verdict: Mapping[str, Any], crossed: Crossed) -> dict[str, Any]:
    """Every other arm against the baseline, and less the placebo."""
    found: dict[str, Any] = {}
    baseline, placebo = verdict["baseline"], verdict["placebo"]
    for arm in (arm for arm in arms if arm != baseline):
        pairs = []
        for base, new in zip(verdict["arms"][baseline]["runs"], verdict["arms"][arm]["runs"], strict=True):
            seed, losses = new["seed"], crossed.get(arm, {}).get(new["seed"], {})
            runs = (arms[baseline][seed], arms[arm][seed])
            pairs.append({"seed": seed, **pair_measures(*runs, base, new, losses)})
        found[arm] = {"against": baseline, **_comparison(pairs, verdict, verdict["arms"][arm])}
    for arm, comparison in found.items():
        aside = found.get(placebo) if arm != placebo else None
        less = aside and against_placebo(comparison["seeds"], aside["seeds"], comparison["test"]["quantity"])
        comparison["against_placebo"] = less
    return found


def _comparison(
    pairs: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """One arm against the baseline of the verdict, over all seeds that both finished."""
    left, base = finished(pairs), verdict["arms"][verdict["baseline"]]
    seeds = {pair["seed"] for pair in left}
    sides = [{**entry, "runs": [run for run in entry["runs"] if run["seed"] in seeds]} for entry in (base, own)]
    average, speed = mean(left), speed_ratios(left) | {"not_quoted": speed_doubt(*sides)}
    for name, key in SPEED_KEYS.items():  # ratios have a geometric mean
        average[key] = speed[name] and speed[name]["mean"]
    test = judged(gap_test(pairs, verdict["margin_percent"], verdict["learning"]["doubt"], verdict["alpha"]), base, own)
    memory = {"not_quoted": memory_doubt(*sides)}
    return {"seeds": list(pairs), "mean": average, "test": test, "speed": speed, "memory": memory}


def arm_label(arm: str, runs: Mapping[int, RunRecord]) -> str:
    """The arm's name for people: `BF16`, `FP8 blockwise`."""
    if arm in BASELINES:
        return arm.upper()
    share = max((finite(run.coverage.get("fp8_flops_share")) or 0.0 for run in runs.values()), default=0.0)
    return f"FP8 {arm}" if share > 0 else arm


@functools.cache
def _placebo_noise() -> float:
    """That of the shipped recipe: an arm with other noise is one to be judged, and says nothing of chance."""
    return max(precision.noise for precision in load_recipe("placebo").precisions.values())


def _arm_entry(arm: str, runs: Mapping[int, RunRecord], seeds: Sequence[int]) -> dict[str, Any]:
    noise = next(iter(runs.values())).noise
    return {
        "label": arm_label(arm, runs),
        "noise": noise,
        "runs": [{"seed": seed, **measures(runs[seed])} for seed in seeds],
    }


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None
