"""A finished run, which tests of the loop and of resuming look at and change."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fp8train.trainer.console import Console
from tests.tiny_run import tiny_train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run of six steps, with an evaluation and a checkpoint after three."""
    folder = tmp_path_factory.mktemp("trained")
    stream = io.StringIO()
    console = Console(6, print_every=1, stream=stream)
    result = tiny_train(folder, "checkpoint.every=3", "eval.every=3", console=console)
    return SimpleNamespace(folder=folder, run_dir=folder / "run", result=result, output=stream.getvalue())


@pytest.fixture
def copied(trained: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the finished run's parent folder, free to be changed."""
    shutil.copytree(trained.folder, tmp_path / "copy")
    return tmp_path / "copy"
