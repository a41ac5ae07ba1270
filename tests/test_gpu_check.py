"""launch/gpu_check.sh without a GPU: refusal, and its bookkeeping with an interpreter that only pretends to work."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.source_tree import ROOT

SCRIPT = ROOT / "launch" / "gpu_check.sh"


def run_script(out: Path, python: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": str(python), "PATH": f"{folder}:{os.environ['PATH']}"}
    environment |= {"TMPDIR": str(folder)} | variables
    return subprocess.run([SCRIPT, out], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def pretender(tmp_path: Path) -> Path:
    """A folder with a `python` that fails where the file `fail` names one of its arguments, and an `nvidia-smi`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(
        f'#!/bin/bash\nfor a in "$@"; do grep -qxF -e "$a" {folder}/fail && exit 7; done\n'
        f'[[ "$*" == *CONFIGS* ]] && echo "$4"gluon_1x1,"$4"ws_1x1\necho "$*" >>{folder}/calls\nexit 0\n'
    )
    (folder / "nvidia-smi").write_text("#!/bin/bash\nexit 0\n")
    (folder / "fail").write_text("nothing\n")
    for name in ("python", "nvidia-smi"):
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, tmp_path / "out"], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no GPU" in done.stderr and len(done.stderr.splitlines()) == 1


def test_every_step_has_a_row(tmp_path: Path, pretender: Path) -> None:
    done = run_script(tmp_path / "out", pretender / "python", pretender)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out" / "summary.md").read_text().splitlines()[2:]
    names = [row.split("|")[1].strip() for row in rows]
    assert names[:3] == ["machine", "environment", "admission"], "correctness comes first"
    tests = {"test_quantisers", "test_producers", "test_rope", "test_fused", "test_gemms", "test_backends"}
    last = tests | {"test_sharding", "train", "test_gluon_1x1", "test_ws_1x1"}
    assert set(names[-len(last) :]) == last, "entries by themselves"
    host = names.index("bench_host")
    assert {"bench_gemm", "bench_quantize", "bench_linear_4096", "bench_step_eager"} <= set(names[3:host])
    entries = {"bench_each_gemm", "bench_each_gemm_wgrad", "bench_entries", "bench_each_adding"}
    assert set(names[host + 1 : host + 5]) == entries
    assert set(names[host + 5 : -len(last)]) == {"bench_step_large", "bench_step_fused"}
    assert all("passed" in row for row in rows)
    calls = (pretender / "calls").read_text()
    for gemms in ("fprop,dgrad", "wgrad"):
        assert f"bench gemm backends=[cublaslt,triton:gluon_1x1,triton:ws_1x1] gemms=[{gemms}] rounds=7 lock=" in calls


def test_figures_and_logs_are_bundled(tmp_path: Path, pretender: Path) -> None:
    """With the real interpreter for what is read from standard input: the bundling itself."""
    python = pretender / "python"
    python.write_text(
        python.read_text().replace('echo "$*"', f'[[ $1 == - ]] && exec {sys.executable} "$@"\necho "$*"')
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "gemm.json").write_text('{"subject": "gemm"}')
    (out / "cut.json").write_text('{"subject": "st')  # as a step that was ended leaves it
    assert run_script(out, python, pretender).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "compiled.tar.xz", "cut.json", "logs.tar.gz", "results.json", "summary.md",
    ]  # fmt: skip
    assert json.loads((out / "results.json").read_text()) == {"gemm": {"subject": "gemm"}, "machine": ""}
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {"machine.log", "bench_gemm.log", "test_ws_1x1.log"} <= set(logs.getnames())


def test_what_was_compiled_lies_in_the_same_place_in_a_later_call(tmp_path: Path, pretender: Path) -> None:
    python = pretender / "python"
    note = f'mkdir -p "$TRITON_CACHE_DIR"; cat "$TRITON_CACHE_DIR/group" >>{pretender}/found 2>/dev/null; '
    note += 'echo "$TRITON_CACHE_DIR" >"$TRITON_CACHE_DIR/group"; '  # like Triton's files, which name each other so
    python.write_text(python.read_text().replace('echo "$*"', note + 'echo "$*"'))
    assert run_script(tmp_path / "first", python, pretender).returncode == 0
    kept = os.path.relpath(tmp_path / "first" / "compiled.tar.xz")
    shutil.rmtree(pretender / "fp8train-compiled")
    (pretender / "found").unlink()
    assert run_script(tmp_path / "second", python, pretender, COMPILED=kept).returncode == 0
    found = (pretender / "found").read_text().splitlines()
    assert found and set(found) == {str(pretender / "fp8train-compiled" / "triton")}
    done = run_script(tmp_path / "third", python, pretender, COMPILED=str(tmp_path / "none"))
    assert done.returncode == 2 and "none" in done.stderr


def test_no_code_is_run_from_the_folder_of_another_user(tmp_path: Path, pretender: Path) -> None:
    cache = pretender / "fp8train-compiled"
    if os.geteuid() == 0:
        cache.mkdir()
        os.chown(cache, 12345, 12345)
    else:
        cache.symlink_to("/usr")
    done = run_script(tmp_path / "out", pretender / "python", pretender)
    assert done.returncode == 2 and "belongs to another user; needs to be yours" in done.stderr
    assert not (pretender / "calls").exists()


def test_a_step_that_fails_costs_its_own_row_and_the_status(tmp_path: Path, pretender: Path) -> None:
    steps = {
        "(swiglu or rmsnorm_quantize) and not compile": "test_producers",  # one of those that run at once
        "gemm and gluon_1x1": "test_gluon_1x1",
        "quantize": "bench_quantize",
    }
    for argument, failed in steps.items():
        (pretender / "fail").write_text(f"{argument}\n")
        done = run_script(tmp_path / argument, pretender / "python", pretender)
        assert done.returncode == 1
        rows = (tmp_path / argument / "summary.md").read_text().splitlines()[2:]
        assert [row.split("|")[1].strip() for row in rows if "failed with status 7" in row] == [failed]
        assert sum("passed" in row for row in rows) == len(rows) - 1


def test_what_the_script_imports_is_there() -> None:
    """The other tests run it with a stand-in for Python."""
    imports = re.findall(r"^from (fp8train[\w.]*) import (\w+)", SCRIPT.read_text(), re.MULTILINE)
    assert len(imports) == 2
    for module, name in imports:
        assert callable(getattr(importlib.import_module(module), name))
