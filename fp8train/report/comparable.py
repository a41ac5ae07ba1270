"""What runs must share for their difference to be about precision: without some of it they are not compared, without
the rest no ratio of their speed or memory is quoted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fp8train.errors import ConfigError
from fp8train.report.run_record import RunRecord
from fp8train.units import ratio_text

# Facts that two runs must share for their difference to be about precision alone: key of result.json -> words for it.
SHARED_FACTS = {
    "model_hash": "model",
    "tokenizer_hash": "tokenizer",
    "data_hash": "data set",
    "tokens_seen": "token count",
    "stream_hash": "data order",
    "eval_hash": "eval set",
    "init_hash": "initial weights",
}
OF_ALL_STEPS = ("stream_hash", "tokens_seen")  # of those, what a run that diverged cannot share: it ended early
ONE_CONFIGURATION = (
    "needs the same for both, or their loss gap says nothing about precision. Train both from one configuration."
)

MOST_SPREAD = 2.0  # 90th over 10th percentile of an arm's speed: beyond, the machine was doing something else as well
STEADY_SPREAD = 1.2  # below, two arms whose speeds overlap are equally fast; above, that is not known
# Steps that log.skip_steps leaves: from here on one lies beyond each of the 10th and 90th percentiles, 1 + 1 / 0.1.
# With fewer the spread is read off the two ends alone, of one step there is none.
LEAST_TIMED = 11
NOT_COMPARABLE = "not comparable"
# What two runs must share for the ratio of their speeds to be about precision: key of environment.json -> words for it.
MACHINE_FACTS = {
    "host": "host",
    "device.name": "device",
    "cpu.name": "CPU",
    "torch_threads": "threads of torch",
    "world_size": "ranks",
    "fp8train": "fp8train",
    "git_commit": "commit of fp8train",
    "torch": "torch",
    "cuda": "CUDA",
    "triton": "Triton",
    "cpu_kernels": "C++ kernels",
    "runs_on_device": "runs at a time on its device",
}
# The same of the way in which they were run: key of config.yaml, and of a derived micro-batch its size.
WAY_FACTS = {
    "parallel.strategy": "parallel",
    "parallel.shard_ranks": "parallel.shard_ranks",
    "parallel.gather": "parallel.gather",
    "parallel.reshard_after_forward": "parallel.reshard_after_forward",
    "micro_batch_samples": "micro-batch",
    "activation_checkpointing": "activation_checkpointing",
    "compile": "compile",
    "weight_copies": "weight_copies",
    "fused": "fused",
    "backend": "backend",
    "deterministic": "deterministic",
    "log.skip_steps": "log.skip_steps",
}
SPEED_FACTS = MACHINE_FACTS | WAY_FACTS
# Of them those that decide what a run keeps in memory.
MEMORY_FACTS = ("device.name", "world_size", *list(WAY_FACTS)[:8])


def check_comparable(runs: Mapping[str, RunRecord]) -> dict[str, Any]:
    """Refuse runs whose difference would not be about precision alone.

    Args:
        runs: name -> run; the first is what the others are held against.

    Returns:
        The facts that they share, by key of SHARED_FACTS; OF_ALL_STEPS as runs that did not diverge share them.

    Raises:
        ConfigError: the runs differ in one of SHARED_FACTS, or one does not say.
    """
    early = [name for name, run in runs.items() if run.result.get("diverged")]
    whole = [name for name in runs if name not in early] or list(runs)[:1]
    for key, words in SHARED_FACTS.items():
        values = {name: runs[name].result.get(key) for name in (whole if key in OF_ALL_STEPS else runs)}
        first = next(iter(values))
        for name, value in values.items():
            if value is None:
                raise ConfigError(
                    f"compare: {runs[name].path} does not say its {words} ({key} in result.json); needs a "
                    "finished run. Let the run finish or repeat it."
                )
            if value != values[first]:
                raise ConfigError(
                    f"compare: {words} differs: {first} has {_short(values[first])}, {name} has {_short(value)}; "
                    f"{ONE_CONFIGURATION}"
                )
    _check_optimizer(runs)
    for name in early:
        _check_step_size(name, runs[name], whole[0], runs[whole[0]])
    return {key: runs[whole[0]].result[key] for key in SHARED_FACTS}


def _check_optimizer(runs: Mapping[str, RunRecord]) -> None:
    """Refuse runs with other settings of the optimizer, also those of a part of a run; what one does not know counts
    as the same.
    """
    first, *others = runs
    for name in others:
        parts = [runs[first].optimizers, runs[name].optimizers]
        steps = sorted({step for part in parts for step in part})
        for step in steps:
            old, new = (part[min(until for until in part if until >= step)] for part in parts)
            for key in (key for key in old if key in new and old[key] != new[key]):
                until = "" if step == steps[-1] else f" until step {step:,.0f}"
                raise ConfigError(
                    f"compare: optim.{key} differs{until}: {first} has {old[key]}, {name} has {new[key]}; "
                    f"{ONE_CONFIGURATION}"
                )


def _check_step_size(name: str, run: RunRecord, other_name: str, other: RunRecord) -> None:
    """Tokens a step of a run that diverged must be those of another, since its token count and order cannot be."""
    own, wanted = (one.train.columns["tokens_seen"][0] / one.train.steps[0] for one in (run, other))
    if own != wanted:
        raise ConfigError(
            f"compare: tokens a step differ: {other_name} has {wanted:,.0f}, {name} has {own:,.0f}; {ONE_CONFIGURATION}"
        )


def speed_doubt(*arms: Mapping[str, Any]) -> str | None:
    """Why the ratio of two arms' speeds says nothing about them, in words; None where it can be quoted.

    Args:
        arms: label and `runs` of each, as verdict.json has them.
    """
    if any((run["ran_on"]["runs_on_device"] or 1) > 1 for arm in arms for run in arm["runs"]):
        return "runs shared a device (compare.parallel), the last of them perhaps with fewer"
    if differences := _differences(SPEED_FACTS, arms):
        return differences
    for arm in arms:
        for key, values in ((key, values) for run in arm["runs"] for key, values in run["moved"].items()):
            return f"{MACHINE_FACTS[key]} of {arm['label']} changed during a run, {' then '.join(map(str, values))}"
    timed = [min(run["timed_steps"] for run in arm["runs"]) for arm in arms]
    if min(timed) < LEAST_TIMED:
        steps = f"{min(timed)} logged step{'s' * (min(timed) != 1)}"
        label = arms[timed.index(min(timed))]["label"]
        return f"{label} was timed over {steps} after its first ones (log.skip_steps), fewer than {LEAST_TIMED}"
    known = [found for arm in arms if (found := speed_range(arm["runs"])) is not None]
    if len(known) < 2:
        return None  # there is no ratio either
    spreads = [high / low for low, high in known]
    widest = spreads.index(max(spreads))
    times = f"{spreads[widest]:,.0f}x" if spreads[widest] >= 10 else ratio_text(spreads[widest])
    varied = f"{arms[widest]['label']}'s steps varied {times}"
    if spreads[widest] > MOST_SPREAD:
        return varied
    if spreads[widest] > STEADY_SPREAD and max(low for low, _ in known) <= min(high for _, high in known):
        return f"{varied}, more than the arms are apart"
    return None


def memory_doubt(*arms: Mapping[str, Any]) -> str | None:
    """Why the ratio of two arms' peak memory says nothing about them, in words; None where it can be quoted."""
    return _differences(MEMORY_FACTS, arms)


def _differences(keys: Iterable[str], arms: Sequence[Mapping[str, Any]]) -> str | None:
    """In which of those facts the arms differ, in words; None where in none."""
    found = {key: text for key in keys if (text := _difference(key, arms))}
    machines = "; ".join(text for key, text in found.items() if key in MACHINE_FACTS)
    ways = "; ".join(text for key, text in found.items() if key in WAY_FACTS)
    words = [f"the arms ran on other machines or software, {machines}"] if machines else []
    words += [f"the arms ran in other ways, {ways}"] if ways else []
    return "; ".join(words) or None


def _difference(key: str, arms: Sequence[Mapping[str, Any]]) -> str:
    """The arms' values of a fact that bears on speed, if they differ: `threads of torch BF16 1, FP8 blockwise 2`."""
    found = [[run["ran_on"][key] for run in arm["runs"]] for arm in arms]
    # seed by seed, as the ratios are; what a run does not say counts as the same
    if not any(None not in pair and any(value != pair[0] for value in pair) for pair in zip(*found, strict=True)):
        return ""
    short = 12 if key == "git_commit" else None
    texts = [" and ".join(dict.fromkeys(str(value)[:short] for value in values)) for values in found]
    return f"{SPEED_FACTS[key]} " + ", ".join(f"{arm['label']} {text}" for arm, text in zip(arms, texts, strict=True))


def speed_range(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Tokens per second of an arm: the lowest 10th and the highest 90th percentile of its runs; None where unknown."""
    edges = [(run["tokens_per_second_p10"], run["tokens_per_second_p90"]) for run in runs]
    if any(not low or not high for low, high in edges):
        return None
    return min(low for low, _ in edges), max(high for _, high in edges)


def doubt(verdict: Mapping[str, Any], arm: str, kind: str) -> str | None:
    """Why the arm's "speed" or "memory" is not held against the baseline's; None where it is, and of the baseline."""
    found: str | None = verdict["comparisons"].get(arm, {}).get(kind, {}).get("not_quoted")
    return found


def quoted(verdict: Mapping[str, Any], arm: str, kind: str, ratio: float | None) -> str:
    """A ratio of the arm's "speed" or "memory" to the baseline's in words, where there is no doubt of it."""
    return NOT_COMPARABLE if doubt(verdict, arm, kind) else ratio_text(ratio)


def _short(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)[:16]
