"""What the stand-in for a full disk must leave alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.full_disk import files_of_at_most


def test_no_cut_off_bytecode_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of modules that are imported for the first time meanwhile, here and in a child."""
    for name in ("imported_here", "imported_there"):
        (tmp_path / f"{name}.py").write_text(f"NUMBERS = {list(range(2000))}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # the child's own folder is left out where PYTHONSAFEPATH is set
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    with files_of_at_most(1000):
        importlib.import_module("imported_here")
        subprocess.run([sys.executable, "-c", "import imported_there"], check=True)
    assert not list(tmp_path.rglob("*.pyc"))
