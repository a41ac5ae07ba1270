"""The configuration of a run that is there, changed for a command that reads its checkpoint."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fp8train._layout import folder
from fp8train.arguments import describe, literal, merged, parse_assignments, structure
from fp8train.checkpoint import Checkpoint, open_checkpoint
from fp8train.config import RunConfig, config_to_dict
from fp8train.data import DataConfig, Dataset, SourceConfig, covers
from fp8train.data.build import configured_tokenizer
from fp8train.data.tokenizers import FileTokenizer
from fp8train.errors import ConfigError, DataError, nearest
from fp8train.trainer.same_run import OTHERWISE_SPLIT

TEXT_KEYS = ("hf_name", "hf_subset", "hf_split", "hf_revision", "text_key")  # beside kind and path: what is read
OTHER_TEXT = "score other text: data=text data.path=FILE data.holdout_fraction=0.9"


def help_on_run(argv: Sequence[str]) -> str:
    """Help on the keys of a run, for a command that reads a checkpoint: with its values where argv names one."""
    given = [argument.removeprefix("checkpoint=") for argument in argv if argument.startswith("checkpoint=")]
    if not given:
        hint = "Those are defaults; checkpoint=DIR --help shows the values of that run, which hold instead."
        return f"{describe(RunConfig)}\n{hint}\n"
    checkpoint = open_checkpoint(os.path.expanduser(given[-1]))
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
    values = literal(config_to_dict(checkpoint.config))
    keys = []
    for change in changes:
        key, _, choice = change.partition("=")
        if key == "data":
            values["data"] = _data_choice(checkpoint, choice)
        else:
            keys.append(change)
    config = structure(RunConfig, merged(values, parse_assignments(keys, RunConfig)), who=command)
    config.data.check_read([key.partition("=")[0].removeprefix("data.") for key in keys if key.startswith("data.")])
    if config.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"{command}: seq_len is {config.seq_len}; needs at most model.max_seq_len={config.model.max_seq_len}."
        )
    if command == "eval":  # the others read training windows
        _check_held_out(checkpoint, config.data, command)
    _check_tokenizer(checkpoint, config.data, command)
    return config


def same_text(one: DataConfig, other: DataConfig) -> bool:
    """Whether two configurations name the same text, however they cut and read it and whatever they hold out."""
    return one.kind == other.kind and sorted(map(_text_of, one.sources)) == sorted(map(_text_of, other.sources))


def _text_of(source: SourceConfig) -> str:
    paths = sorted(str(Path(path).resolve()) for path in source.paths)
    return repr([source.kind, paths, *(getattr(source, key) for key in TEXT_KEYS)])


def check_split(checkpoint: Checkpoint, config: RunConfig, dataset: Dataset, command: str) -> None:
    """Refuse windows that the run was trained on: a larger share of a small corpus is held out for longer windows.

    Raises:
        ConfigError: some source would hold out more than the run did.
    """
    trained = checkpoint.state.data_position.get("thresholds")
    if not same_text(config.data, checkpoint.config.data):
        return
    if trained is None:
        if len({split.threshold for split in dataset.splits}) > 1:
            raise ConfigError(f"{command}: {OTHERWISE_SPLIT}")
        return
    if any(split.threshold > before for split, before in zip(dataset.splits, trained, strict=True)):
        raise ConfigError(
            f"{command}: seq_len={config.seq_len} would hold out more of the run's own text than its "
            f"seq_len={checkpoint.config.seq_len} did, which it was trained on; needs at most as much. Lower seq_len, "
            f"or {OTHER_TEXT}."
        )


def _check_held_out(checkpoint: Checkpoint, data: DataConfig, command: str) -> None:
    """Refuse a configuration by which text that the run was trained on would count as held out."""
    trained, own = checkpoint.config.data.holdout_fraction, same_text(data, checkpoint.config.data)
    if not data.holdout_fraction:
        remedy = OTHER_TEXT if own else "set data.holdout_fraction=0.9"
        raise ConfigError(f"{command}: data.holdout_fraction is 0; needs some text held out. To go on, {remedy}.")
    cuts = [[source.document_bytes for source in one.sources] for one in (data, checkpoint.config.data)]
    if own and cuts[0] != cuts[1]:
        raise ConfigError(
            f"{command}: data.document_bytes is not what the run cut its text with, so that other documents would be "
            f"held out than it held out; needs the same. Leave it out, or {OTHER_TEXT}."
        )
    if own and data.holdout_fraction > trained:
        raise ConfigError(
            f"{command}: data.holdout_fraction is {data.holdout_fraction:g}, but the run held out {trained:g} of this "
            f"text and was trained on the rest; needs at most that. Leave it out, or {OTHER_TEXT}."
        )


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
    """The data group of that name, with tokenizer, separator and document mask of the run."""
    files = {path.stem: path for path in (folder("configs") / "data").glob("*.yaml")}
    if choice not in files:
        raise ConfigError(f"data: no file {choice!r} in configs/data/; {nearest(choice, sorted(files))}.")
    tokenizer = configured_tokenizer(checkpoint.config.data)
    data = yaml.safe_load(files[choice].read_text(encoding="utf-8")) or {}
    kept = {
        "tokenizer": "bytes" if tokenizer.path is None else str(tokenizer.path),
        "separator": tokenizer.separator_token if isinstance(tokenizer, FileTokenizer) else None,
        "document_mask": checkpoint.config.data.document_mask,
    }
    return {**data, **literal(kept)}
