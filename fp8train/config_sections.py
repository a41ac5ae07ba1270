"""Sections of a run configuration: ranks, checkpoints, evaluation, logs, profile, black box, comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fp8train.errors import ConfigError, nearest
from fp8train.spikes import SIGMAS, WINDOW

WANDB_MODES = ("off", "offline", "online")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How a run is spread over processes.

    strategy: ddp (each rank holds all parameters, gradients and moments) or fsdp (its rows of each, torch's FSDP2)
    shard_ranks: consecutive ranks over which fsdp shards, such as those of a machine, each such group all parameters;
        null: all ranks
    gather: what fsdp gathers of a layer's weights: operands (what its GEMMs multiply: FP8 codes, or BF16) or fp32 (the
        masters, of which each rank makes those); the same numbers
    reshard_after_forward: fsdp frees a layer's weights behind its forward, and gathers them again for backward; false
        keeps all layers whole in between, for half of the traffic
    timeout_seconds: how long a rank waits for the others, at start and in every collective
    """

    strategy: str = "ddp"
    gather: str = "operands"
    reshard_after_forward: bool = True
    shard_ranks: int | None = None
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        need_one_of("parallel.strategy", self.strategy, ("ddp", "fsdp"))
        need_one_of("parallel.gather", self.gather, ("operands", "fp32"))
        need_at_least("parallel.timeout_seconds", self.timeout_seconds, 1)
        if self.shard_ranks is not None and self.strategy == "ddp":
            raise ConfigError(
                f"parallel.shard_ranks: got {self.shard_ranks} with parallel=ddp, which shards nothing; needs "
                "parallel=fsdp. Set that, or leave shard_ranks out."
            )
        if self.shard_ranks is not None and self.shard_ranks < 2:
            raise ConfigError(
                f"parallel.shard_ranks: got {self.shard_ranks}; needs at least 2, or null. For parameters that every "
                "rank holds set parallel=ddp."
            )

    def check(self, world_size: int) -> None:
        """Refuse groups of ranks that do not come out even.

        Raises:
            ConfigError: shard_ranks is no divisor of the number of ranks.
        """
        if self.shard_ranks is not None and world_size % self.shard_ranks:
            divisors = [str(n) for n in range(2, world_size + 1) if world_size % n == 0]
            raise ConfigError(
                f"parallel.shard_ranks: got {self.shard_ranks}; needs a divisor of the number of ranks, {world_size}, "
                f"or null. To go on, set parallel.shard_ranks={' or '.join([*divisors, 'null'])}, or take another "
                "number of ranks."
            )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept; one is always written at the end and at a signal.

    every: steps between checkpoints; null: none by the number of steps
    minutes: time after the last one, or after the start, at which one is written as well; null: none by the clock
    keep_last: newest checkpoints that are kept
    keep_every: checkpoints at multiples of this step are kept for good; null: none
    background: write them while training goes on, from a copy in the host's memory; false: training waits
    allow_recipe_change: resume under a recipe whose hash differs from the checkpoint's
    """

    every: int | None = None
    minutes: float | None = 30.0
    keep_last: int = 2
    keep_every: int | None = None
    background: bool = True
    allow_recipe_change: bool = False

    def __post_init__(self) -> None:
        need_at_least("checkpoint.every", self.every, 1)
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"checkpoint.minutes: got {self.minutes}; needs more than 0, or null.")
        need_at_least("checkpoint.keep_last", self.keep_last, 1)
        need_at_least("checkpoint.keep_every", self.keep_every, 1)


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation on fixed held-out windows, at the end and every so many steps.

    every: steps between evaluations; null: only at the end
    first: evaluate before the first step too, as runs of a comparison always do
    bf16: evaluate in BF16 too, whatever the recipe
    """

    every: int | None = None
    first: bool = False
    bf16: bool = True

    def __post_init__(self) -> None:
        need_at_least("eval.every", self.every, 1)


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """What is written where; metrics.jsonl is always written.

    every: steps between rows of metrics.jsonl and the other sinks
    print_every: steps between console lines (a terminal shows a progress bar in between)
    skip_steps: first steps of every process that are left out of every throughput: result.json has that of the last
        process, a report that of all of them together, over logged steps
    wandb: off, offline or online
    wandb_project: project that the run appears under
    tensorboard: write event files to run_dir/tensorboard
    """

    every: int = 1
    print_every: int = 10
    skip_steps: int = 5
    wandb: str = "off"
    wandb_project: str = "fp8train"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.wandb == "False":  # YAML 1.1 reads a bare `off` as false
            self.wandb = "off"
        need_one_of("log.wandb", self.wandb, WANDB_MODES)
        need_at_least("log.every", self.every, 1)
        need_at_least("log.print_every", self.print_every, 1)
        need_at_least("log.skip_steps", self.skip_steps, 0)


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Trace of a few steps by torch.profiler, one file a rank in run_dir/profile.

    steps: first and last step of the window, such as [10,12]; null: no profile
    """

    steps: list[int] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise ConfigError(f"profile.steps: got {self.steps}; needs [FIRST,LAST] with 1 <= FIRST <= LAST.")


@dataclass(kw_only=True, slots=True)
class BlackBoxConfig:
    """What is written to run_dir/blackbox when a step is not finite or its loss leaps, for `fp8train replay`.

    keep: dumps of a run at most, the first ones and the newest; 0: none
    window: steps whose losses say what is usual, and steps of silence after a dump, twice as many with each beyond keep
    spike_sigmas: a loss so many robust deviations (and 10 %) above the median of the last five is a spike
    weights_gib: weights of a step that was not finite are kept up to this size
    """

    keep: int = 4
    window: int = WINDOW
    spike_sigmas: float = SIGMAS
    weights_gib: float = 64.0

    def __post_init__(self) -> None:
        need_at_least("blackbox.keep", self.keep, 0)
        need_at_least("blackbox.window", self.window, 20)
        need_at_least("blackbox.spike_sigmas", self.spike_sigmas, 1)
        need_at_least("blackbox.weights_gib", self.weights_gib, 0)


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """What `fp8train compare` trains side by side.

    arms: recipes, the baseline first; null: bf16, with several seeds placebo, and the run's recipe
    seeds: runs of each arm, with seeds seed, seed+1, and so on
    parallel: runs at a time, each in a process of its own with its share of the threads; runs that share a device are
        not compared by speed
    margin_percent: largest gap of the mean held-out loss that counts as equal
    looks: verdicts planned as seeds are added (compare.seeds=3, then 6: two); they share the 5 % of the tests
    skip_damaged: leave damaged lines of metrics out of the comparison, in place of refusing the file
    """

    arms: list[str] | None = None
    seeds: int = 1
    parallel: int = 1
    margin_percent: float = 0.25
    looks: int = 1
    skip_damaged: bool = False

    def __post_init__(self) -> None:
        need_at_least("compare.seeds", self.seeds, 1)
        need_at_least("compare.parallel", self.parallel, 1)
        need_at_least("compare.looks", self.looks, 1)
        if not self.margin_percent > 0:
            raise ConfigError(f"compare.margin_percent: got {self.margin_percent}; needs more than 0.")


def need_one_of(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices; the nearest are named."""
    if value not in choices:
        raise ConfigError(f"{key}: got {value!r}; {nearest(value, choices)}.")


def need_at_least(key: str, value: float | None, least: float) -> None:
    """Refuse a number below `least`; None passes."""
    if value is not None and not value >= least:
        raise ConfigError(f"{key}: got {value}; needs at least {least}.")
