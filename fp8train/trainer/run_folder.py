"""The folder of one run: who may use it, what is in it, what a finished run left there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from fp8train.checkpoint import Checkpoint, saved_steps
from fp8train.config import RunConfig, config_to_dict
from fp8train.errors import CheckpointError, ConfigError
from fp8train.metrics import METRICS_FILE, Metrics, metrics_lines, missing_rows
from fp8train.recipe import Recipe
from fp8train.trainer.environment import environment
from fp8train.trainer.same_run import changed_keys, check_finished
from fp8train.whole_file import write_whole

RESULT_FILE = "result.json"
EVENTS_FILE = "events.jsonl"  # what alarms did
# what an attempt at a run leaves without a checkpoint
RECORD = (
    METRICS_FILE, EVENTS_FILE, "blackbox", "tensorboard", "wandb_id", "config.yaml", "recipe.yaml", "environment.json",
)  # fmt: skip

# Facts of environment.json that say when and by which command a process began, not where it ran.
OF_THIS_START = ("date", "command", "resumed_step", "git_dirty")


@dataclass(kw_only=True, slots=True)
class RunResult:
    """What a run came to; result.json holds it, less evals and coverage, which have files of their own.

    run_dir: run folder
    finished: all steps are done; false after a signal, the time limit, or where it diverged
    stopped_by: what ended it early, such as "SIGTERM"; null
    diverged: {"step", "reason"} of a run that ended early since its steps were not finite any more; null
    device: GPU name, or "cpu"
    world_size: ranks
    steps, tokens_seen: of the whole run, resumed parts included
    epochs: how often they read the training text of each source; without streams, whose end is not known
    skipped_steps: steps whose loss or gradient was not finite
    final_train_loss: of the last step, in nats per token; null where it was not finite
    evals: rows of metrics.jsonl that carry eval_loss
    tokens_per_second: median over the steps of this process but its first log.skip_steps
    peak_memory_bytes: of the device; on a CPU of the process
    memory_bytes: what is held from step to step, by kind
    save_seconds: time in which this process waited for checkpoints
    train_seconds: time in steps, resumed parts and steps that an alarm undid included; without what a kill lost
    seconds: wall time of this process, from building the model to the end
    fp8_flops_share: share of the linears' training FLOPs that ran in FP8
    parameters: number of trainable parameters
    coverage: content of coverage.json
    model_hash, tokenizer_hash, data_hash, eval_hash, init_hash: what two runs must share to be comparable
    stream_hash: of the token ids of all steps, in order
    """

    run_dir: str
    finished: bool
    stopped_by: str | None
    diverged: dict[str, Any] | None = None
    device: str
    world_size: int
    steps: int
    tokens_seen: int
    epochs: dict[str, float] = field(default_factory=dict)
    skipped_steps: int
    final_train_loss: float | None
    evals: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_second: float | None
    peak_memory_bytes: int
    memory_bytes: dict[str, int]
    train_seconds: float
    save_seconds: float = 0.0
    seconds: float
    fp8_flops_share: float
    parameters: int
    coverage: dict[str, Any] = field(default_factory=dict)
    model_hash: str
    tokenizer_hash: str
    data_hash: str
    eval_hash: str
    init_hash: str
    stream_hash: str


def check_folder(path: Path, resume: str) -> None:
    """Refuse a folder that a run must not write to. Writes nothing.

    Raises:
        ConfigError: it is not empty and resume=never, or it has metrics and resume names a checkpoint of another run,
            unless they are those of a run that resumed the same and has saved nothing.
        CheckpointError: it is a file.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"run_dir: {path} is a file; needs a folder, new or of a run. Give another run_dir.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if resume == "never":
        raise ConfigError(
            f"run_dir: {path} is not empty and resume=never; needs an empty one. Give another run_dir or resume=auto."
        )
    own = resume == "auto" or path.resolve() in Path(resume).resolve().parents or _begun_so(path, resume)
    if not own and (path / METRICS_FILE).exists():
        raise ConfigError(
            f"resume: {resume} belongs to another run than run_dir={path}, which holds metrics; needs a new run_dir or "
            "a checkpoint below it. Leave out `resume` to go on with what is there, or give another run_dir."
        )


def _begun_so(path: Path, resume: str) -> bool:
    """Whether a run that had to resume the same ended in this folder before its first checkpoint was whole."""
    try:
        begun = dict(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return False
    return begun.get("resume") == resume and not saved_steps(path)


def finished_result(path: Path, config: RunConfig) -> RunResult | None:
    """The result of this run if it is finished in this folder, or None.

    Raises:
        ConfigError: another run is finished there, with at least as many steps.
        CheckpointError: result.json or config.yaml is damaged.
    """
    file = path / RESULT_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not content["finished"] or content["steps"] < config.steps:
            return None
        file = path / "coverage.json"
        coverage = json.loads(file.read_text(encoding="utf-8"))
        result = RunResult(**content, evals=saved_evals(path), coverage=coverage)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); delete it to train on from the newest checkpoint."
        ) from error
    check_finished(config, path)
    return result


def saved_evals(path: Path) -> list[dict[str, Any]]:
    """Evaluation rows of the metrics in a run folder."""
    file = path / METRICS_FILE
    return [row for _, row in metrics_lines(file) if "eval_loss" in row] if file.is_file() else []


def lost_rows(path: Path, found: Checkpoint | None) -> list[str]:
    """Lines that say which rows a metrics.jsonl lacks up to a checkpoint of its own run."""
    missing = None if found is None else missing_rows(path / METRICS_FILE, found.step, found.config.log.every)
    return [] if missing is None else [f"{METRICS_FILE}: the rows of steps {missing[0]} to {missing[1]} are missing"]


def write_result(result: RunResult) -> None:
    """Write result.json and coverage.json."""
    content = dataclasses.asdict(result)
    del content["evals"], content["coverage"]
    folder = Path(result.run_dir)
    write_file(folder / "coverage.json", json.dumps(result.coverage, indent=1))
    write_file(folder / RESULT_FILE, json.dumps(content, indent=1, allow_nan=False))


def write_run_files(
    path: Path,
    config: RunConfig,
    recipe: Recipe,
    device: torch.device,
    facts: Mapping[str, Any],
    found: Checkpoint | None,
) -> None:
    """Write config.yaml, recipe.yaml and environment.json; the run counts as unfinished from here on.

    Args:
        facts: put into environment.json beside what `environment` finds, such as ranks and hashes.
        found: the checkpoint that the run goes on from; where its configuration or recipe is another, that is kept.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    (path / RESULT_FILE).unlink(missing_ok=True)  # of an earlier, shorter run: this one is not finished
    place = dict(facts) | environment(device)
    _keep_earlier(path, config, recipe, found)
    _keep_place(path, place, found)
    write_file(path / "config.yaml", yaml.safe_dump(config_to_dict(config), sort_keys=False))
    write_file(path / "recipe.yaml", recipe.text)
    write_file(path / "environment.json", json.dumps(place, indent=1))


def _keep_earlier(path: Path, config: RunConfig, recipe: Recipe, found: Checkpoint | None) -> None:
    """Write config.until_step_30.yaml, and recipe.*: of the steps up to the checkpoint, where those after it differ.

    Those of steps that the run goes back behind are removed.
    """
    for file in [*path.glob("*.until_step_*.yaml"), *path.glob("environment.until_step_*.json")]:
        number = file.stem.rpartition("_")[2]
        if number.isdecimal() and (found is None or int(number) > found.step):  # else it is no file of ours
            file.unlink()
    if found is not None and changed_keys(found.state.config, config):
        text = yaml.safe_dump(found.state.config, sort_keys=False)
        write_file(path / f"config.until_step_{found.step}.yaml", text)
    if found is not None and found.recipe_hash != recipe.hash:
        write_file(path / f"recipe.until_step_{found.step}.yaml", found.state.recipe_text)


def _keep_place(path: Path, place: Mapping[str, Any], found: Checkpoint | None) -> None:
    """Keep environment.json as environment.until_step_30.json, where the steps after the checkpoint run elsewhere.

    What an attempt that saved nothing since recorded is not kept: its steps are gone.
    """
    file = path / "environment.json"
    if found is None or not file.is_file():
        return
    kept = path / f"environment.until_step_{found.step}.json"
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # damaged: it says nothing of those steps
        return
    if not kept.exists() and any(before.get(key) != place[key] for key in place if key not in OF_THIS_START):
        file.rename(kept)


def set_aside(path: Path) -> str | None:
    """Rename what a run wrote that is begun anew: metrics.jsonl to metrics-1.jsonl, its config.yaml to config-1.yaml.

    Returns:
        str: the new name of metrics.jsonl, with the first number that is free; None where it has no rows to keep.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    metrics = path / METRICS_FILE
    if not metrics.is_file() or not metrics.stat().st_size:
        return None
    number = 1
    while any(_numbered(path / name, number).exists() for name in RECORD):
        number += 1
    try:
        for file in (path / name for name in RECORD):
            if file.exists():
                file.rename(_numbered(file, number))
    except OSError as error:
        raise _not_written(metrics, error) from error
    return _numbered(metrics, number).name


def _numbered(file: Path, number: int) -> Path:
    """metrics.jsonl -> metrics-1.jsonl"""
    return file.with_stem(f"{file.stem}-{number}")


def open_metrics(run_dir: Path, config: RunConfig, step: int, warn: Callable[[str], None]) -> Metrics:
    """The sinks of a run that has so many steps behind it, as its configuration asks for them; on rank 0 only."""
    return Metrics(
        run_dir,
        wandb=config.log.wandb,
        wandb_project=config.log.wandb_project,
        tensorboard=config.log.tensorboard,
        config=config_to_dict(config),
        resumed_step=step,
        warn=warn,
    )


def write_file(path: Path, text: str) -> None:
    """Replace a file as a whole; a reader sees the old text or the new.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({error.strerror or error}); needs a writable folder with space."
    )
