"""Data configuration: the shipped groups load, values are checked when they are set."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fp8train._layout import folder
from fp8train.arguments import structure
from fp8train.data import DataConfig
from fp8train.data.config import KINDS
from fp8train.errors import DataError

GROUPS = sorted((folder("configs") / "data").glob("*.yaml"))


def test_each_kind_has_its_group() -> None:
    assert {path.stem for path in GROUPS} == set(KINDS)


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: path.stem)
def test_group_names_its_kind_and_only_known_keys(path: Path) -> None:
    config = structure(DataConfig, yaml.safe_load(path.read_text()), who=path.name)
    assert config.kind == path.stem


def test_mix_entries_become_sources() -> None:
    config = structure(DataConfig, {"kind": "mix", "mix": [{"kind": "text", "path": ["a", "b"], "weight": 2}]}, who="x")
    assert config.mix[0].paths == ["a", "b"]
    assert config.mix[0].weight == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "txt"}, "data.kind: is 'txt'; needs one of stdlib, text, jsonl, tokens, hf, mix"),
        ({"path": 7}, "data.path: is 7"),
        ({"path": []}, "data.path: is \\[\\]"),
        ({"weight": 0.0}, "data.weight: is 0.0"),
        ({"document_bytes": 0}, "data.document_bytes: is 0"),
        ({"hf_shuffle_buffer": -1}, "data.hf_shuffle_buffer: is -1"),
        ({"holdout_fraction": 1.0}, "data.holdout_fraction: is 1.0; needs 0 <= fraction < 1"),
        ({"eval_windows": 0}, "data.eval_windows: is 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_value_is_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DataConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "a.jsonl"}, "is a.jsonl but data.kind is stdlib, .* needs kind text or jsonl or .* Add data=KIND"),
        ({"kind": "mix", "path": "a.jsonl"}, "data.path: is a.jsonl but data.kind is mix"),
        ({"kind": "text", "text_key": "body"}, "data.text_key: is body but data.kind is text"),
        ({"kind": "jsonl", "hf_split": "validation"}, "data.hf_split: .* needs kind hf. Add data=hf, or leave"),
        ({"kind": "hf", "verify": True}, "data.verify: is True but data.kind is hf, .* needs kind tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_key_that_the_kind_does_not_read_is_refused_where_it_is_typed(values: dict[str, object], message: str) -> None:
    config = DataConfig(**values)  # type: ignore[arg-type]  # as a stored configuration may have it
    with pytest.raises(DataError, match=message):
        config.check_read()
    config.check_read(["weight"])
