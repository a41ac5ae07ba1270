from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from fp8train.backends import coverage
from fp8train.checkup.subject import Subject
from fp8train.doctor import CHECKS, attempt
from fp8train.errors import TrainingError
from tests.mutations.catalogue import MUTATIONS, README, Mutation, table
from tests.tiny_run import tiny_config, tiny_train


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """One layer of width 256, so that every weight has several blocks."""
    folder = tmp_path_factory.mktemp("mutations")
    return Subject(tiny_config(folder, "model.hidden_size=256", "data.eval_windows=4"), torch.device("cpu"))


def caught(catcher: str, arguments: tuple, subject: Subject, folder: Path) -> bool:
    """Whether the catcher finds something."""
    kind, _, name = catcher.partition(" ")
    if kind == "doctor":
        return not attempt(name, subject).passed
    try:
        if catcher == "strict coverage":
            tiny_train(folder, "steps=1", "data.eval_windows=1", "micro_batch_samples=2", "data.holdout_fraction=0")
        else:
            module, _, function = catcher.partition("::")
            getattr(importlib.import_module(module), function)(*arguments)
    except (AssertionError, TrainingError):
        return True
    return False


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_documented_failure_is_caught(
    mutation: Mutation, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation.inject(monkeypatch)
    assert caught(mutation.catcher, mutation.arguments, subject, tmp_path)
    coverage.COUNTS.reset()


@pytest.mark.parametrize(
    ("catcher", "arguments"),
    sorted({(m.catcher, m.arguments) for m in MUTATIONS}, key=lambda pair: pair[0]),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_catcher_finds_nothing_in_sound_code(catcher: str, arguments: tuple, subject: Subject, tmp_path: Path) -> None:
    assert not caught(catcher, arguments, subject, tmp_path)


def test_every_catcher_exists() -> None:
    for mutation in MUTATIONS:
        kind, _, name = mutation.catcher.partition(" ")
        assert kind != "doctor" or name in CHECKS
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 15


def test_table_is_up_to_date() -> None:
    assert README.read_text() == table(), "python -m tests.mutations.catalogue"
