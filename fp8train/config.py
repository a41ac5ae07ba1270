"""Run configuration: dataclasses hold types and defaults, configs/*.yaml what differs, arguments have the last word."""

from __future__ import annotations

import os.path
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fp8train._layout import folder
from fp8train.arguments import describe, literal, merged, parse_assignments, structure
from fp8train.config_sections import (
    BlackBoxConfig,
    CheckpointConfig,
    CompareConfig,
    EvalConfig,
    LogConfig,
    ParallelConfig,
    ProfileConfig,
    need_at_least,
    need_one_of,
)
from fp8train.convert import COPIES, FUSED
from fp8train.data import DataConfig, with_model_tokenizer
from fp8train.errors import ConfigError, nearest
from fp8train.hf_fp8 import packing_of
from fp8train.models import ModelConfig, read_config_json, resolve_config
from fp8train.models.recompute import CHOICES as CHECKPOINTING
from fp8train.optim import OptimConfig, learning_rate, warmup_steps
from fp8train.telemetry.config import TelemetryConfig

GROUPS = ("model", "data", "optim", "parallel", "experiment")
MICRO_BATCH_TOKENS = 16384  # derived micro-batch; a constant, so that the split does not depend on the machine


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One training run.

    recipe: precision of every linear: name of a file in recipes/, or a path
    backend: what executes FP8: auto (the best that can run here) or a name; fp8train explain says which and why
    fused: norms and MLPs that make the FP8 input of linears themselves: auto (those that the backend has kernels for),
        always (all that the precisions permit) or never; rotary embeddings likewise
    weight_copies: FP8 codes of a weight that are kept between steps: both (w for fprop, w.T for dgrad) or one (w;
        backward makes w.T, a layer at a time: one byte a parameter less, the same numbers, more time)
    steps: optimizer steps in all
    seed: of initial weights and data order
    run_dir: run folder; null: runs/MODEL-RECIPE-seedN
    resume: auto (newest checkpoint in run_dir, if any), never, or the path of a checkpoint
    seq_len: tokens of one training sequence
    global_batch_tokens: tokens of one optimizer step, over all ranks
    micro_batch_samples: sequences a rank takes at once; null: as many as fit 16384 tokens and divide the batch
    compile: torch.compile the model
    deterministic: only deterministic algorithms (slower on a GPU)
    activation_checkpointing: none, selective (keeps results of GEMMs and attention) or full (keeps layer inputs)
    time_limit_seconds: save and stop after this long; null: no limit
    strict: stop after the first step if a GEMM that was planned in FP8 received tokens and ran in another precision
    """

    recipe: str = "blockwise"
    backend: str = "auto"
    fused: str = "auto"
    weight_copies: str = "both"
    steps: int = 300
    seed: int = 1
    run_dir: str | None = None
    resume: str = "auto"
    seq_len: int = 256
    global_batch_tokens: int = 2048
    micro_batch_samples: int | None = None
    compile: bool = False
    deterministic: bool = False
    activation_checkpointing: str = "none"
    time_limit_seconds: float | None = None
    strict: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    blackbox: BlackBoxConfig = field(default_factory=BlackBoxConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        need_one_of("fused", self.fused, FUSED)
        need_one_of("weight_copies", self.weight_copies, COPIES)
        need_one_of("activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        for name in ("steps", "seq_len", "global_batch_tokens", "micro_batch_samples"):
            need_at_least(name, getattr(self, name), 1)
        if self.run_dir == "":  # as from run_dir=$UNSET; the empty path would be the folder that the user stands in
            raise ConfigError("run_dir: got an empty text; needs a folder. Give run_dir=DIR, or leave it out.")
        # shells leave the ~ of model.init_from=~/x alone, some also that of run_dir=~/x
        for owner, name in ((self, "run_dir"), (self, "resume"), (self.model, "init_from")):
            if (path := getattr(owner, name)) is not None:
                setattr(owner, name, os.path.expanduser(path))
        if self.time_limit_seconds is not None and not self.time_limit_seconds > 0:
            raise ConfigError(f"time_limit_seconds: got {self.time_limit_seconds}; needs more than 0, or null.")

    def check(self, world_size: int | None = None) -> None:
        """Refuse values that contradict each other.

        Args:
            world_size: ranks of the run; None where that is not known yet.

        Raises:
            ConfigError: names both values and the nearest that would do.
        """
        if world_size is not None:
            self.parallel.check(world_size)
        world_size = world_size or 1
        if not self.model.has_shape:
            wanted = "needs a preset such as model=quickstart, every size, or model=hf model.init_from=DIR."
            raise ConfigError(f"model: no size is given; {wanted}")
        if self.seq_len > self.model.max_seq_len:
            most = f"the model takes at most {self.model.max_seq_len}"
            raise ConfigError(f"seq_len: got {self.seq_len}, {most}. Lower seq_len or raise model.max_seq_len.")
        samples, rest = divmod(self.global_batch_tokens, self.seq_len)
        if rest or samples % world_size:
            unit = self.seq_len * world_size
            near = max(1, round(self.global_batch_tokens / unit)) * unit
            raise ConfigError(
                f"global_batch_tokens: got {self.global_batch_tokens}; needs a multiple of seq_len x ranks = "
                f"{self.seq_len} x {world_size} = {unit}. Nearest: global_batch_tokens={near}."
            )
        per_rank = samples // world_size
        if self.micro_batch_samples is not None and per_rank % self.micro_batch_samples:
            divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
            raise ConfigError(
                f"micro_batch_samples: got {self.micro_batch_samples}; needs a divisor of the {per_rank} sequences of "
                f"a rank ({self.global_batch_tokens} tokens / {self.seq_len} / {world_size} ranks). "
                f"Divisors: {', '.join(map(str, divisors))}."
            )
        if self.weight_copies == "one" and self.parallel.strategy == "fsdp" and world_size > 1:
            raise ConfigError(
                "weight_copies: got one with parallel=fsdp, whose layers keep none; needs both, the default. Leave "
                "weight_copies out."
            )
        warmup = warmup_steps(self.optim, self.steps)
        if warmup >= self.steps:
            wanted = f"needs fewer than steps={self.steps}. Lower it or raise steps."
            raise ConfigError(f"optim.warmup_steps: got {warmup}; {wanted}")
        learning_rate(self.optim, 0, self.steps)  # refuses a decay that does not fit

    @property
    def global_batch_samples(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.global_batch_tokens // self.seq_len

    def micro_batch(self, world_size: int) -> int:
        """Sequences a rank takes at once: the given number, else the largest divisor within MICRO_BATCH_TOKENS."""
        per_rank = self.global_batch_samples // world_size
        limit = max(1, MICRO_BATCH_TOKENS // self.seq_len)
        return self.micro_batch_samples or max(n for n in range(1, min(limit, per_rank) + 1) if per_rank % n == 0)


def load_config(overrides: Sequence[str], command: str = "train") -> RunConfig:
    """Compose a run configuration from configs/ and the command line.

    Group choices (model=llama_125m, experiment=quickstart) select YAML files; every other key=value is applied on top,
    as are -h/--help (keys, their values and choices), `--cfg job` (print the resolved configuration) and --config-dir
    DIR (a folder with groups of the user's own); the first two print and exit with status 0. Without experiment=NAME
    a model brings the experiment of its own name, if there is one, or none; without either it is the quickstart.

    Args:
        overrides: command line arguments.
        command: names the default run folder: runs/MODEL-RECIPE-seedN, for compare runs/compare-MODEL-RECIPE.

    Raises:
        ConfigError: unknown key or choice (the nearest is named), wrong type, values that contradict each other.
    """
    arguments, print_config, extra = _split_options(list(overrides), command)
    folders = [folder("configs"), *extra]
    choices = {group: sorted({p.stem for base in folders for p in (base / group).glob("*.yaml")}) for group in GROUPS}
    selected = [argument for argument in arguments if argument.partition("=")[0] in GROUPS]
    for argument in selected:
        group, _, choice = argument.partition("=")
        if choice not in (*choices[group], *(["null"] if group == "experiment" else [])):
            raise ConfigError(f"{group}: no file {choice!r} in configs/{group}/; {nearest(choice, choices[group])}.")
    values = _compose(selected + _own_experiment(selected, choices["experiment"]), folders)
    if print_config == "help":
        sys.stdout.write(_help(command, choices, values))
        raise SystemExit(0)
    assigned = parse_assignments([argument for argument in arguments if argument not in selected], RunConfig)
    config = structure(RunConfig, merged(values, assigned), who=command)
    config.model = resolve_config(config.model)
    if config.model.init_from is not None:
        packing_of(read_config_json(config.model.init_from), config.model.init_from)
    config.data = with_model_tokenizer(config.data, config.model.init_from)
    for source in (config.data, *config.data.mix):
        source.check_read()
    if config.run_dir is None:
        config.run_dir = _default_run_dir(config, command)
    config.check()
    if print_config == "job":
        sys.stdout.write(yaml.safe_dump(config_to_dict(config), sort_keys=False))
        raise SystemExit(0)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, for config.yaml and checkpoints."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def config_from_dict(values: Mapping[str, Any], *, who: str = "config.yaml") -> RunConfig:
    """The configuration that config_to_dict described.

    Raises:
        ConfigError: a key or type that RunConfig does not have.
    """
    return structure(RunConfig, literal(values), who=who)


def _split_options(overrides: list[str], command: str) -> tuple[list[str], str | None, list[Path]]:
    """key=value arguments, what to print instead of running ("help", "job" or None), added folders."""
    arguments, show, extra = [], None, []
    while overrides:
        argument = overrides.pop(0)
        name, _, value = argument.partition("=")
        if argument in ("-h", "--help"):
            show = "help"
        elif name in ("--cfg", "-c", "--config-dir", "-cd"):
            value = os.path.expanduser(value or (overrides.pop(0) if overrides else ""))
            if name in ("--cfg", "-c"):
                if value != "job":
                    raise ConfigError(f"{command}: --cfg got {value!r}; needs job.")
                show = "job"
            elif not value or not Path(value).is_dir():  # Path("") is where the user stands
                raise ConfigError(f"{command}: --config-dir got {value!r}; needs an existing folder.")
            else:
                extra.append(Path(value).resolve())
        elif argument in ("-m", "--multirun") or name.replace("/", ".").partition(".")[0] == "hydra":
            raise ConfigError(
                f"{command}: got {argument!r}; needs the keys of one run, which is all that a command makes. Sweep by "
                f"a loop: for lr in 1e-3 3e-3; do fp8train {command} optim.lr=$lr run_dir=runs/lr-$lr; done."
            )
        elif argument.startswith("-") or "=" not in argument:
            raise ConfigError(f"{command}: got {argument!r}; needs key=value, --cfg job, --config-dir DIR or --help.")
        else:
            arguments.append(argument.removeprefix("++").removeprefix("+"))
    return arguments, show, extra


def _own_experiment(selected: Sequence[str], experiments: Sequence[str]) -> list[str]:
    """Where a model is chosen and no experiment: that of its name or none, for another's batch and rate are not its."""
    chosen = dict(argument.split("=", 1) for argument in selected)
    name = "null" if chosen.get("model") not in experiments else chosen["model"]
    return [f"experiment={name}"] if "model" in chosen and "experiment" not in chosen else []


def _compose(selected: list[str], folders: Sequence[Path]) -> dict[str, Any]:
    groups = ["~experiment" if choice == "experiment=null" else choice for choice in selected]
    search = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in folders[1:])}]"] if folders[1:] else []
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3"):
            values = OmegaConf.to_container(compose("train", overrides=groups + search))
    except yaml.YAMLError as error:  # its further lines have file and line
        raise ConfigError(f"configs: {' '.join(str(error).split())}. Correct the file.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"configs: {str(error).splitlines()[0]}. Correct the file.") from error
    if "experiment" in values:  # type: ignore[operator]
        raise ConfigError(
            "configs/experiment: the file that is chosen sets its keys below `experiment`; needs them at the top. "
            "Begin it with the line `# @package _global_`."
        )
    return values  # type: ignore[return-value]


def _default_run_dir(config: RunConfig, command: str) -> str:
    stem = f"{config.model.name}-{Path(config.recipe).stem}"
    return f"runs/compare-{stem}" if command == "compare" else f"runs/{stem}-seed{config.seed}"


def _help(command: str, choices: Mapping[str, Sequence[str]], values: Mapping[str, Any]) -> str:
    usage = f"usage: fp8train {command} [GROUP=CHOICE ...] [KEY=VALUE ...] [--cfg job] [--config-dir DIR]"
    lines = [usage, "", "groups:"]
    lines += [f"  {group:11s} {', '.join(names)}" for group, names in choices.items()]
    lines += [
        "",
        "A model brings the experiment of its own name, if there is one; below are the values of what is chosen.",
    ]
    return "\n".join([*lines, "", describe(RunConfig, values)])
