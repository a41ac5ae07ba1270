"""Files of a checkpoint: writes that fail, are interrupted or killed, and what the library reads back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fp8train.checkpoint import files, find_resume
from fp8train.checkpoint.files import FolderWriter
from fp8train.errors import CheckpointError
from tests.checkpoint.tiny_checkpoint import save, save_checkpoint, saved_steps, start, training_state
from tests.full_disk import files_of_at_most


def test_leftovers_of_a_killed_save_are_cleared_away(tmp_path):
    (tmp_path / "checkpoints" / ".step_00000001.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step_00000001.tmp" / "model.safetensors").write_bytes(b"half")
    assert find_resume(tmp_path, "auto") is None
    save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_write_that_fails_leaves_no_half_checkpoint_and_the_earlier_ones(tmp_path):
    save(tmp_path, 10)
    model, optimizer = start()
    state = training_state()
    with (
        files_of_at_most(1000),
        pytest.raises(CheckpointError, match=r"step_00000020: cannot be written: File too large") as caught,
    ):
        save_checkpoint(tmp_path, 20, model, optimizer, state, last=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]
    assert find_resume(tmp_path, "auto").step == 10


def test_write_that_fails_leaves_the_checkpoint_of_the_same_step(tmp_path):
    path = save(tmp_path, 10)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    model, optimizer = start()
    state = training_state()
    with files_of_at_most(1000), pytest.raises(CheckpointError):
        save_checkpoint(tmp_path, 10, model, optimizer, state)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"])
def test_full_disk_at_any_file_is_one_line(tmp_path, monkeypatch, name):
    save(tmp_path, 10)
    write = FolderWriter.write

    def full(self, file, pieces):
        if file == name:
            raise OSError(28, "No space left on device")
        write(self, file, pieces)

    monkeypatch.setattr(files.FolderWriter, "write", full)
    with pytest.raises(CheckpointError, match="No space left on device; needs a writable run_dir with space"):
        save(tmp_path, 20)
    assert saved_steps(tmp_path) == [10]


def test_place_that_cannot_hold_a_folder_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path, 1)


def test_interrupt_while_saving_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(self, name, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.FolderWriter, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_killed_save_costs_only_the_checkpoint_that_was_being_written(tmp_path):
    """SIGKILL after the first file: the next process finds step 1 and clears the rest away."""
    save(tmp_path, 1)
    script = f"""
import os, signal
from fp8train.checkpoint.files import begin_folder, part_of_folder
from pathlib import Path
folder = begin_folder(Path({str(tmp_path)!r}) / "checkpoints" / "step_00000002")
with part_of_folder(folder, 0) as writer:
    writer.write("model.safetensors", iter([b"half"]))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, timeout=60, check=False)
    assert done.returncode == -9
    assert find_resume(tmp_path, "auto").step == 1
    save(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000003"]


def test_checkpoint_that_somebody_reads_on_nfs_goes_with_a_later_save(tmp_path, monkeypatch):
    def held(path):
        """As the client of NFS has it: an open file gets another name in its folder, and keeps that until it closes."""
        number = errno.EBUSY if (path / ".nfs1").exists() else errno.ENOTEMPTY
        for file in path.iterdir():
            file.unlink()
        (path / ".nfs1").touch()
        raise OSError(number, os.strerror(number), str(path))

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", held)
        for step in (2, 3):
            save(tmp_path, step, last=1)
            assert find_resume(tmp_path, "auto", recover=True).step == step
            assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == [f"step_{step:08d}"]
    save(tmp_path, 4, last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]


def test_checkpoint_that_may_not_be_removed_is_one_line(tmp_path, monkeypatch):
    def forbidden(path, ignore_errors=False):
        if ignore_errors:
            return
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    save(tmp_path, 1)
    monkeypatch.setattr(files.shutil, "rmtree", forbidden)
    with pytest.raises(CheckpointError, match="cannot be removed: Permission denied; needs a writable run_dir.*whole"):
        save(tmp_path, 2, last=1)


def test_safetensors_of_every_dtype_and_shape_are_read_back_by_the_library(tmp_path):
    tensors = {
        **{str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in files._DTYPES},
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "view": torch.arange(10.0)[3:7],
    }
    FolderWriter(tmp_path).write_tensors("x.safetensors", tensors, {"key": "value"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_fp8_in_a_state_dict_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="FP8 is derived state"):
        FolderWriter(tmp_path).write_tensors("x", {"codes": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {})
