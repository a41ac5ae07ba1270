"""Whether the run that a folder holds is the one that is asked for: what must be the same, what may differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fp8train.arguments import flattened
from fp8train.checkpoint import Checkpoint, find_resume
from fp8train.config import RunConfig, config_to_dict
from fp8train.config_sections import ParallelConfig
from fp8train.data import Dataset
from fp8train.data.config import KINDS, READ_BY
from fp8train.errors import CheckpointError, ConfigError
from fp8train.recipe import Recipe, load_recipe
from fp8train.trainer.evaluation import EvalSet

# What a run must share with the checkpoint that it goes on from; the rest (steps, optim, log, ...) may change.
FIXED_SECTIONS = ("model", "data", "seed", "seq_len", "global_batch_tokens")
# The fingerprint of the data, which must be the same, is also that of the tokenizer.
RESUME_MAY_DIFFER = (
    "model.init_from", "model.activations", "data.path", "data.tokenizer", "data.verify", "data.eval_windows",
)  # fmt: skip
OTHERWISE_SPLIT = (
    "this mix was begun with a version of fp8train that held out other documents of its larger sources (the share of "
    "its smallest); needs that version to go on. Give another run_dir, or finish it with the version that "
    "environment.json names."
)
# What does not reach the numbers: a finished run, or an arm of a comparison, is the same whatever stands here.
BESIDE_THE_NUMBERS = (
    "run_dir", "resume", "time_limit_seconds", "log", "checkpoint", "profile", "compare", "parallel", "telemetry",
    "weight_copies",
)  # fmt: skip


def changed_keys(begun: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[str, str]]:
    """Dotted keys that reach the numbers and differ -> their values as text, (in `begun`, in `config`).

    Args:
        begun: a configuration as config.yaml or a checkpoint holds it; a key that it does not know does not count.
    """
    then = flattened(begun)
    return {
        key: (_text(then[key]), _text(value))
        for key, value in flattened(config_to_dict(config)).items()
        if key.partition(".")[0] not in BESIDE_THE_NUMBERS and key in then and then[key] != value
    }


def resume_mode(run_dir: Path, config: RunConfig) -> str:
    """config.resume, or "auto" where it names the folder itself or a checkpoint that the folder's run went on from.

    The same command, given again after a stop, then goes on from the newest checkpoint of its own and not from the one
    that it names. Checkpoints say what their run was told to resume, so that those of another past do not count.
    """
    if config.resume in ("auto", "never"):
        return config.resume
    if Path(config.resume).resolve() == run_dir.resolve():
        return "auto"
    try:
        newest = find_resume(run_dir, "auto")
    except CheckpointError:  # all of them are damaged: the named one serves
        return config.resume
    if newest is None or newest.state.config.get("resume") != config.resume:
        return config.resume
    other = newest.recipe_hash != load_recipe(config.recipe).hash or changed_keys(newest.state.config, config)
    return config.resume if other else "auto"


def check_finished(config: RunConfig, path: Path) -> None:
    """Refuse to take the finished run of a folder for the one that is asked for, if it is another.

    Raises:
        ConfigError: names the recipe or the first key that differs, and both values.
        CheckpointError: config.yaml is missing or damaged.
    """
    file = path / "config.yaml"
    try:
        begun = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); needs that of a run. Give another run_dir."
        ) from error
    then, now = load_recipe(path / "recipe.yaml").hash, load_recipe(config.recipe).hash
    changes = _with_recipe(changed_keys(begun, config), str(begun.get("recipe")), then, config.recipe, now)
    for key, (old, new) in changes.items():
        raise ConfigError(
            f"run_dir: {path} is a finished run with {key}={old}, this one has {key}={new}; needs the same. "
            "Give another run_dir."
        )


def data_facts(dataset: Dataset, eval_set: EvalSet | None) -> dict[str, Any]:
    """What a checkpoint keeps of the data, so that a resume finds the same and evaluation nothing of the training."""
    return {
        "fingerprint": dataset.fingerprint,
        "thresholds": [split.threshold for split in dataset.splits],
        "eval_hash": None if eval_set is None else eval_set.windows_hash,
        "scored_by": None if eval_set is None else eval_set.hash,
        "streams": dataset.stream_positions(),
        "former": list(getattr(dataset, "former_fingerprints", ())),
    }


def check_same_run(config: RunConfig, data: Mapping[str, Any], found: Checkpoint) -> None:
    """Refuse to go on from a checkpoint of a run on another model, other data or another order of them.

    Args:
        data: data_facts of this run.

    Raises:
        ConfigError: names the first key that differs, and both values.
    """
    own, other = (flattened(_beside_places(values)) for values in (config_to_dict(config), found.state.config))
    for key, value in own.items():
        fixed = key.partition(".")[0] in FIXED_SECTIONS and key not in RESUME_MAY_DIFFER
        if fixed and key in other and other[key] != value:
            raise ConfigError(
                f"resume: {key} is {value!r}, the checkpoint {found.path} has {other[key]!r}; needs the same. "
                f"Set {key}={other[key]}, or give another run_dir."
            )
    before = found.state.data_position
    same_windows = config.data.eval_windows == found.config.data.eval_windows
    for key, what in (("fingerprint", "the data"), ("eval_hash", "the held-out text")):
        then, now = before.get(key), data[key]
        if key == "eval_hash" and (then is None or now is None or not same_windows):
            continue
        if key == "fingerprint" and "thresholds" not in before and then in data["former"]:
            continue
        if then != now and "thresholds" not in before and config.data.kind == "mix":
            raise ConfigError(f"resume: {OTHERWISE_SPLIT}")
        if then != now:
            raise ConfigError(
                f"resume: {what} is {now[:12]}, was {str(then)[:12]} when {found.path} was saved; needs the same "
                "text, tokenizer and split. Restore them, or give another run_dir."
            )
    if found.step > config.steps:
        raise ConfigError(
            f"steps: got {config.steps}, the checkpoint {found.path} is at {found.step}; needs at least as many. "
            "Raise steps, or give another run_dir."
        )


def _beside_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what its data does not read, and without where the sources of a mix lie.

    The fingerprint says what they hold.
    """
    data = values.get("data", {})
    places = [key.partition(".")[2] for key in RESUME_MAY_DIFFER if key.startswith("data.")]
    mix = [{key: value for key, value in entry.items() if key not in places} for entry in data.get("mix", ())]
    read = {key: value for key, value in data.items() if data.get("kind") in READ_BY.get(key, KINDS)}
    return {**values, "data": {**read, "mix": mix}}


def changes_since(
    config: RunConfig, recipe: Recipe, found: Checkpoint, ranks: int, eval_set: EvalSet | None = None
) -> list[str]:
    """One line for each setting that is another from the checkpoint on: `optim.lr: 0.0015 -> 0.01 from step 31`.

    Strategy and number of ranks are among them: sums over other ranks are of the same terms in another order. So is the
    held-out loss of a mix, which earlier versions did not weigh by the shares.
    """
    begun = found.state.config
    changes = _with_recipe(
        changed_keys(begun, config), str(begun.get("recipe")), found.recipe_hash, config.recipe, recipe.hash
    )
    for key in ("strategy", "shard_ranks"):  # earlier versions had only what is the default
        then, now = begun.get("parallel", {}).get(key, getattr(ParallelConfig(), key)), getattr(config.parallel, key)
        if then != now:
            changes[f"parallel.{key}"] = (_text(then), _text(now))
    before = len(found.state.random_states)  # of every rank; a checkpoint without them does not say how many
    if before and before != ranks:
        changes["ranks"] = (str(before), str(ranks))
    mix = eval_set is not None and eval_set.hash != eval_set.windows_hash
    if mix and "scored_by" not in found.state.data_position:
        changes["held-out loss"] = ("mean over the windows", "weighed by the shares of the mix")
    return [f"{key}: {old} -> {new} from step {found.step + 1}" for key, (old, new) in changes.items()]


def _with_recipe(
    changes: Mapping[str, tuple[str, str]], old: str, old_hash: str, new: str, new_hash: str
) -> dict[str, tuple[str, str]]:
    """Changed keys, where a recipe counts by what it means, not by what it is called; it comes first."""
    rest = {key: values for key, values in changes.items() if key != "recipe"}
    if old_hash == new_hash:
        return rest
    return {"recipe": (f"{old} ({old_hash[:12]})", f"{new} ({new_hash[:12]})")} | rest


def _text(value: Any) -> str:
    """A value as it would be typed: `null`, `true`, `[1, 2]`."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).splitlines()[0]
