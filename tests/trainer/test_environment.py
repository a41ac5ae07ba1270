from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from fp8train.trainer import environment as module
from fp8train.trainer.environment import environment
from tests.source_tree import ROOT


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_checkout_is_the_folder_that_holds_the_package():
    assert module.CHECKOUT == ROOT


def test_commit_is_that_of_the_checkout_and_a_change_makes_it_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(module, "CHECKOUT", tmp_path)
    found = environment(torch.device("cpu"))
    assert (found["git_commit"], found["git_dirty"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "code.py").write_text("a = 2\n")
    assert environment(torch.device("cpu"))["git_dirty"] is True


@pytest.mark.parametrize("installed", [True, False], ids=["installed package", "checkout without git"])
def test_without_git_both_are_null(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHECKOUT", None if installed else tmp_path)
    found = environment(torch.device("cpu"))
    assert (found["git_commit"], found["git_dirty"]) == (None, None)
