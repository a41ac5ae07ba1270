"""What two runs of one comparison say: loss gaps, speed and memory. Pure functions from run records to the content
of verdict.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fp8train.errors import ConfigError
from fp8train.report.run_record import RunRecord, Table, finite
from fp8train.units import loss_text, percent_text, ratio_text

SMOOTHING = (
    0.9  # DeepSeek-V3 (arXiv:2412.19437) shows its losses smoothed by an EMA of 0.9, and its 0.25 % refers to that
)
WARMUP_FRACTION = 0.05
MAX_WARMUP_ROWS = 20
ONE_SEED = "with one seed the spread between seeds is unknown, so the gap cannot be told from chance"
NO_TEST = "no equivalence test across seeds was made"

# Facts that two runs must share for their difference to be about precision alone: key of result.json -> words for it.
SHARED_FACTS = {
    "model_hash": "model",
    "tokenizer_hash": "tokenizer",
    "data_hash": "data set",
    "stream_hash": "data order",
    "tokens_seen": "token count",
    "eval_hash": "eval set",
    "init_hash": "initial weights",
}


def ema(values: np.ndarray, decay: float = SMOOTHING) -> np.ndarray:
    """Exponential moving average: e_0 = v_0, e_t = decay e_(t-1) + (1 - decay) v_t; a NaN is passed over (the
    average stays).

    Args:
        values: [rows] float64.

    Returns:
        [rows] float64; NaN until the first finite value.
    """
    smoothed = np.empty(len(values), dtype=np.float64)
    current = math.nan
    for index, value in enumerate(values.tolist()):
        if math.isfinite(value):
            current = decay * current + (1 - decay) * value if math.isfinite(current) else value
        smoothed[index] = current
    return smoothed


def paired(baseline: Table, other: Table, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that both tables have with a finite value, and the two values there: (steps, baseline, other)."""
    steps, left, right = np.intersect1d(baseline.steps, other.steps, assume_unique=True, return_indices=True)
    base, new = baseline.columns[column][left], other.columns[column][right]
    both = np.isfinite(base) & np.isfinite(new)
    return steps[both], base[both], new[both]


def relative_loss_error(baseline: Table, other: Table) -> dict[str, Any]:
    """Relative error of the training loss, 100 (other - baseline) / baseline in percent, over the steps that both
    logged.

    Returns:
        final_percent: at the last step, unsmoothed. ema_final_percent: both losses smoothed by `ema` first.
        ema_max_percent: largest magnitude of the smoothed error over all steps, at ema_max_step. steps: how many
        steps entered.
    """
    steps, base, new = paired(baseline, other, "loss")
    if not len(steps):
        return {
            "final_percent": None,
            "ema_final_percent": None,
            "ema_max_percent": None,
            "ema_max_step": None,
            "steps": 0,
        }
    smooth_base = ema(base)
    smoothed = 100 * (ema(new) - smooth_base) / smooth_base
    worst = int(np.argmax(np.abs(smoothed)))
    return {
        "final_percent": finite(100 * (new[-1] - base[-1]) / base[-1]),
        "ema_final_percent": finite(smoothed[-1]),
        "ema_max_percent": finite(abs(smoothed[worst])),
        "ema_max_step": int(steps[worst]),
        "steps": len(steps),
    }


def heldout_gap(
    baseline: Table, other: Table, column: str = "eval_loss", bytes_column: str = "bits_per_byte"
) -> dict[str, Any]:
    """Gap of the held-out loss at the last step that both evaluated: nats (other - baseline), percent of the baseline,
    bits per byte. None where a loss was not finite there.
    """
    steps, left, right = np.intersect1d(baseline.steps, other.steps, assume_unique=True, return_indices=True)
    if not len(steps):
        return {"step": None, "nats": None, "percent": None, "bits_per_byte": None}
    base, new = baseline.columns[column][left[-1]], other.columns[column][right[-1]]
    bits = other.columns[bytes_column][right[-1]] - baseline.columns[bytes_column][left[-1]]
    return {
        "step": int(steps[-1]),
        "nats": finite(new - base),
        "percent": finite(100 * (new - base) / base),
        "bits_per_byte": finite(bits),
    }


def steady(table: Table, column: str) -> np.ndarray:
    """Values after the warm-up rows: the first 5 %, at least one and at most 20 rows, of more than three."""
    values = table.columns[column]
    skip = min(MAX_WARMUP_ROWS, max(1, math.ceil(WARMUP_FRACTION * len(values)))) if len(values) > 3 else 0
    values = values[skip:]
    return values[np.isfinite(values)]


def measures(run: RunRecord) -> dict[str, Any]:
    """What one run reached: losses, speed, memory, share of FLOPs in FP8. None where a number is absent or not
    finite.
    """
    speed = steady(run.train, "tokens_per_second")
    low, median, high = np.percentile(speed, (10, 50, 90)).tolist() if len(speed) else (None, None, None)
    losses = run.train.columns["loss"]
    return {
        "run_dir": str(run.path),
        "steps": int(run.train.steps[-1]),
        "tokens_seen": finite(run.result.get("tokens_seen")) or run.train.last("tokens_seen"),
        "train_loss": run.train.last("loss"),
        "train_loss_ema": finite(ema(losses)[-1]),
        "eval_loss": run.evals.last("eval_loss"),
        "eval_loss_bf16": run.evals.last("eval_loss_bf16"),
        "bits_per_byte": run.evals.last("bits_per_byte"),
        "bits_per_byte_bf16": run.evals.last("bits_per_byte_bf16"),
        "nonfinite_losses": int(np.count_nonzero(~np.isfinite(losses))),
        "skipped_steps": run.result.get("skipped_steps"),
        "tokens_per_second": median,
        "tokens_per_second_p10": low,
        "tokens_per_second_p90": high,
        "train_seconds": finite(run.result.get("train_seconds")),
        "peak_memory_bytes": finite(run.result.get("peak_memory_bytes")),
        "fp8_flops_share": finite(run.coverage.get("fp8_flops_share")),
        "backend": run.coverage.get("backend"),
    }


def pair_measures(baseline: RunRecord, other: RunRecord) -> dict[str, Any]:
    """How one run differs from the baseline run of the same seed."""
    base, new = measures(baseline), measures(other)
    return {
        "relative_loss_error": relative_loss_error(baseline.train, other.train),
        "heldout_gap": heldout_gap(baseline.evals, other.evals),
        "heldout_gap_bf16": heldout_gap(baseline.evals, other.evals, "eval_loss_bf16", "bits_per_byte_bf16"),
        "tokens_per_second_ratio": _ratio(new["tokens_per_second"], base["tokens_per_second"]),
        "peak_memory_ratio": _ratio(new["peak_memory_bytes"], base["peak_memory_bytes"]),
    }


def check_comparable(runs: Mapping[str, RunRecord]) -> dict[str, Any]:
    """Refuse runs whose difference would not be about precision alone.

    Args:
        runs: name -> run; the first is what the others are held against.

    Returns:
        The facts that they share, by key of SHARED_FACTS.

    Raises:
        ConfigError: the runs differ in one of SHARED_FACTS, or one does not say.
    """
    names = list(runs)
    for key, words in SHARED_FACTS.items():
        values = {name: run.result.get(key) for name, run in runs.items()}
        for name, value in values.items():
            if value is None:
                raise ConfigError(
                    f"compare: {runs[name].path} does not say its {words} ({key} in result.json); needs a "
                    "finished run. Let the run finish or repeat it."
                )
            if value != values[names[0]]:
                raise ConfigError(
                    f"compare: {words} differs: {names[0]} has {_short(values[names[0]])}, {name} has {_short(value)}; "
                    "needs the same for both, or their loss gap says nothing about precision. Train both from "
                    "one configuration."
                )
    return {key: runs[names[0]].result[key] for key in SHARED_FACTS}


def make_verdict(arms: Mapping[str, Mapping[int, RunRecord]], *, baseline: str) -> dict[str, Any]:
    """The content of verdict.json.

    Args:
        arms: arm -> seed -> run; every arm has the same seeds.
        baseline: the arm that the others are held against.

    Returns:
        status, reason and sentence; arms: per arm its label and `runs` per seed; comparisons: per other arm its
        `seeds` and their mean;
        shared: per seed what all arms have in common.

    Raises:
        ConfigError: the runs of a seed are not comparable (check_comparable).
    """
    seeds = sorted(arms[baseline])
    shared = {seed: check_comparable({arm: runs[seed] for arm, runs in arms.items()}) for seed in seeds}
    verdict: dict[str, Any] = {
        "version": 1,
        "status": "indicative",
        "reason": ONE_SEED if len(seeds) == 1 else NO_TEST,
        "sentence": "",
        "baseline": baseline,
        "seeds": seeds,
        "smoothing": SMOOTHING,
        "arms": {
            arm: {"label": arm_label(arm, runs), "runs": _by_seed(seeds, lambda seed, runs=runs: measures(runs[seed]))}
            for arm, runs in arms.items()
        },
        "comparisons": {},
        "shared": [{"seed": seed, **facts} for seed, facts in shared.items()],
    }
    for arm, runs in arms.items():
        if arm != baseline:
            pairs = _by_seed(seeds, lambda seed, runs=runs: pair_measures(arms[baseline][seed], runs[seed]))
            verdict["comparisons"][arm] = {"against": baseline, "seeds": pairs, "mean": _mean(pairs)}
    verdict["sentence"] = " ".join(sentence(verdict, arm) for arm in verdict["comparisons"])
    return verdict


def arm_label(arm: str, runs: Mapping[int, RunRecord]) -> str:
    """The arm's name for people: `BF16`, `FP8 blockwise`."""
    if arm in ("bf16", "fp32"):
        return arm.upper()
    share = max((finite(run.coverage.get("fp8_flops_share")) or 0.0 for run in runs.values()), default=0.0)
    return f"FP8 {arm}" if share > 0 else arm


def sentence(verdict: Mapping[str, Any], arm: str) -> str:
    """One comparison in one sentence, for the console and the top of the report."""
    comparison = verdict["comparisons"][arm]
    label, base_label = verdict["arms"][arm]["label"], verdict["arms"][comparison["against"]]["label"]
    new, base = (_mean(verdict["arms"][name]["runs"]) for name in (arm, comparison["against"]))
    evaluated = all(pair["heldout_gap"]["step"] is not None for pair in comparison["seeds"])
    if evaluated:
        gap, where = comparison["mean"]["heldout_gap"]["percent"], "held-out loss"
        loss, base_loss = new["eval_loss"], base["eval_loss"]
    else:
        gap, where = comparison["mean"]["relative_loss_error"]["ema_final_percent"], "smoothed training loss"
        ended = new["train_loss"] is not None and base["train_loss"] is not None  # the average passes over NaN
        loss, base_loss = (new["train_loss_ema"], base["train_loss_ema"]) if ended else (None, None)
    if gap is None or loss is None or base_loss is None:
        return f"{label} cannot be held against {base_label}: a loss is not finite at the end."
    losses = f"{loss_text(loss)} against {loss_text(base_loss)} nats per token"
    text = f"{label} ended {_above(gap)} {base_label} in {where} ({losses})"
    speed, memory = comparison["mean"]["tokens_per_second_ratio"], comparison["mean"]["peak_memory_ratio"]
    cost = [f"{ratio_text(speed)} its tokens per second"] if speed is not None else []
    cost += [f"{ratio_text(memory)} its peak memory"] if memory is not None else []
    return f"{text}, at {' and '.join(cost)}." if cost else f"{text}."


def _above(gap: float) -> str:
    if abs(gap) < 0.005:
        return "level with"
    return f"{percent_text(abs(gap))} {'above' if gap > 0 else 'below'}"


def _by_seed(seeds: Sequence[int], of: Any) -> list[dict[str, Any]]:
    return [{"seed": seed, **of(seed)} for seed in seeds]


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of every number, in nested mappings too; None where a seed has none; what is not a number is
    left out.
    """
    result: dict[str, Any] = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(first, Mapping):
            result[key] = _mean(values)
        elif key not in ("seed", "step", "ema_max_step") and all(
            value is None or type(value) in (int, float) for value in values
        ):
            result[key] = None if any(value is None for value in values) else sum(values) / len(values)
    return result


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def _short(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)[:16]
