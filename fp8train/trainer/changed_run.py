"""The configuration of a run that is there, changed for a command that reads its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from fp8train._layout import folder
from fp8train.arguments import describe, merged, nearest, parse_assignments, structure
from fp8train.checkpoint import Checkpoint, open_checkpoint
from fp8train.config import RunConfig, config_to_dict
from fp8train.data import DataConfig, covers
from fp8train.data.build import configured_tokenizer
from fp8train.errors import ConfigError, DataError


def help_on_run(argv: Sequence[str]) -> str:
    """Help on the keys of a run, for a command that reads a checkpoint: with its values where argv names one."""
    given = [argument.removeprefix("checkpoint=") for argument in argv if argument.startswith("checkpoint=")]
    if not given:
        hint = "Those are defaults; checkpoint=DIR --help shows the values of that run, which hold instead."
        return f"{describe(RunConfig)}\n{hint}\n"
    checkpoint = open_checkpoint(given[-1])
    return f"{describe(RunConfig, config_to_dict(checkpoint.config))}\nThose are the values of {checkpoint.path}.\n"


def evaluation_config(checkpoint: Checkpoint, changes: Sequence[str], command: str) -> RunConfig:
    """The configuration of the run, with the changes that were asked for.

    Args:
        changes: KEY=VALUE of RunConfig, and data=CHOICE, which replaces the data but keeps the tokenizer.
        command: that asks, named in errors.

    Raises:
        ConfigError: unknown key or choice, wrong type, or windows longer than the model takes.
        DataError: the text would be in another tokenizer than the run's.
    """
    values = config_to_dict(checkpoint.config)
    keys = []
    for change in changes:
        key, _, choice = change.partition("=")
        if key == "data":
            values["data"] = _data_choice(checkpoint, choice)
        else:
            keys.append(change)
    config = structure(RunConfig, merged(values, parse_assignments(keys, RunConfig)), who=command)
    if config.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"{command}: seq_len is {config.seq_len}; needs at most model.max_seq_len={config.model.max_seq_len}."
        )
    if not config.data.holdout_fraction:
        raise ConfigError(
            f"{command}: data.holdout_fraction is 0; needs some text held out. Set data.holdout_fraction=0.05."
        )
    _check_tokenizer(checkpoint, config.data, command)
    return config


def _check_tokenizer(checkpoint: Checkpoint, data: DataConfig, command: str) -> None:
    """Refuse text in ids that mean something else than those of the training, where that tokenizer is still there."""
    try:
        trained = configured_tokenizer(checkpoint.config.data)
    except DataError:
        return
    tokenizer = configured_tokenizer(data)
    if not covers(tokenizer, trained):
        raise DataError(
            f"{command}: the text is in the tokenizer {tokenizer.name} ({tokenizer.vocab_size} ids), the run was "
            f"trained in {trained.name} ({trained.vocab_size} ids); needs that one. Leave out data.tokenizer, and "
            "prepare token shards with it."
        )


def _data_choice(checkpoint: Checkpoint, choice: str) -> dict[str, Any]:
    """The data group of that name, with the tokenizer of the run."""
    files = {path.stem: path for path in (folder("configs") / "data").glob("*.yaml")}
    if choice not in files:
        raise ConfigError(f"data: no file {choice!r} in configs/data/; {nearest(choice, sorted(files))}.")
    tokenizer = configured_tokenizer(checkpoint.config.data)
    data = yaml.safe_load(files[choice].read_text(encoding="utf-8")) or {}
    return data | {"tokenizer": "bytes" if tokenizer.path is None else str(tokenizer.path)}
