"""Checkpoints that are written while training goes on: what they hold, and what becomes of them when a run ends."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # noqa: F401 - takes seconds, and is loaded here once for all ranks
from safetensors.torch import load_file

from fp8train.checkpoint import checkpoint_path, content, open_checkpoint, saved_steps
from fp8train.checkpoint.content import Content, own_part, part_of, parts_of
from fp8train.checkpoint.files import FolderWriter, begin_folder, target_of
from fp8train.distributed import World
from fp8train.errors import CheckpointError
from fp8train.trainer import Trainer, saver
from fp8train.trainer.console import Console
from tests.distributed.ranks import own_folders, run_ranks
from tests.tiny_run import tiny_config, tiny_train

SAVING = (
    "checkpoint.every=2", "checkpoint.keep_last=9", "data.holdout_fraction=0", "optim=adamw_constant",
    "optim.clip_grad_norm=null",
)  # fmt: skip
SECONDS = 60.0


def files_of(run: Path, step: int) -> dict[str, bytes]:
    """Content of the tensor files of a checkpoint."""
    return {path.name: path.read_bytes() for path in checkpoint_path(run, step).glob("*.safetensors")}


class Telling(Console):
    """Has an event for each step that has been trained."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.trained = {step: threading.Event() for step in range(1, 7)}

    def step(self, row, eta_seconds) -> None:
        self.trained[row["step"]].set()


def test_training_goes_on_meanwhile_and_the_checkpoint_is_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_train(tmp_path, *SAVING, "checkpoint.background=false", run="waiting")
    console, write = Telling(), FolderWriter.write_tensors

    def later(self, name, tensors, metadata):
        step = int(target_of(self.folder).name.removeprefix("step_"))
        assert step == 6 or console.trained[step + 1].wait(SECONDS), "training waits for the checkpoint"
        write(self, name, tensors, metadata)

    monkeypatch.setattr(FolderWriter, "write_tensors", later)
    tiny_train(tmp_path, *SAVING, console=console)
    for step in (2, 4, 6):
        assert len(files_of(tmp_path / "run", step)) == 2
        assert files_of(tmp_path / "run", step) == files_of(tmp_path / "waiting", step)


def test_failure_ends_the_run_soon_and_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write, steps = FolderWriter.write_tensors, []

    def full(self, name, tensors, metadata):
        if target_of(self.folder).name == "step_00000004":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensors, metadata)

    class Slow(Console):
        def step(self, row, eta_seconds) -> None:
            steps.append(row["step"])
            time.sleep(0.05)  # the thread has failed by then, or a step later

    monkeypatch.setattr(FolderWriter, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"step_00000004: cannot be written: No space left on device"):
        tiny_train(tmp_path, *SAVING, "steps=1000", console=Slow(enabled=False))
    assert steps[-1] < 1000
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def test_rank_that_does_not_see_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saver, "appears", lambda path: False)
    with pytest.raises(CheckpointError, match="step_00000002: the folder of rank 0 is not to be seen; run_dir"):
        tiny_train(tmp_path, *SAVING)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "place"), [(ZeroDivisionError, "step"), (KeyboardInterrupt, "step"), (KeyboardInterrupt, "settle")]
)
def test_error_that_ends_a_run_leaves_it_the_checkpoint_that_was_being_written(
    error: type[BaseException], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, failed = FolderWriter.write_tensors, threading.Event()

    def fail(*_arguments: object, **_options: object) -> None:
        failed.set()
        raise error

    class Failing(Console):
        def step(self, row, eta_seconds) -> None:
            if row["step"] == 3 and place == "step":
                fail()

    def later(self, name, tensors, metadata):
        assert failed.wait(SECONDS)
        time.sleep(0.1)
        write(self, name, tensors, metadata)

    monkeypatch.setattr(FolderWriter, "write_tensors", later)
    if place == "settle":  # where step 4 waits for the checkpoint of step 2
        monkeypatch.setattr(saver, "on_every_rank", fail)
    with pytest.raises(error):
        tiny_train(tmp_path, *SAVING, console=Failing(enabled=False))
    assert open_checkpoint(tmp_path / "run").step == 2


def test_ctrl_c_twice_says_how_long_the_checkpoint_is_waited_for_and_waits_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    aborted, seconds, said, wait = threading.Event(), [], [], saver.wait

    class Aborted(Console):
        def info(self, text: str) -> None:
            said.append(text)

        def step(self, row, eta_seconds) -> None:
            if row["step"] == 3:
                raise KeyboardInterrupt

    def briefly(futures, timeout=None):
        if timeout is None:
            aborted.set()
        elif timeout:
            seconds.append(timeout)
        return wait(futures, None if timeout is None else 0)

    def never(self, name, tensors, metadata):
        assert aborted.wait(SECONDS)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FolderWriter, "write_tensors", never)
    monkeypatch.setattr(saver, "wait", briefly)
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, *SAVING, console=Aborted(enabled=False))
    assert seconds == [saver.ABORT_SECONDS]
    assert said[-2:] == [
        "warning: a checkpoint is being written: it has 30 s to become whole",
        f"aborted: nothing saved in {tmp_path / 'run'}",
    ]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_host_without_room_for_a_copy_has_training_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Listening(Console):
        said: list[str] = []

        def info(self, text: str) -> None:
            self.said.append(text)

    saves, save = [], saver.Saver.save

    def watched(self, step, *arguments):
        save(self, step, *arguments)
        saves.append(saved_steps(tmp_path / "run")[-1] == step)

    monkeypatch.setattr(saver, "free_host_bytes", lambda: 1000)
    monkeypatch.setattr(saver.Saver, "save", watched)
    result = tiny_train(tmp_path, *SAVING, console=Listening(enabled=False))
    assert saves == [True, True, True] and result.save_seconds > 0
    (told,) = [line for line in Listening.said if "training waits for checkpoints" in line]
    assert "has 1000 B of memory free, and a copy to write from takes 2.82 MiB" in told


def test_no_two_attempts_at_a_checkpoint_share_a_folder(tmp_path: Path):
    """Another machine may still see under the first one's name what is a whole checkpoint by now."""
    folders = {begin_folder(checkpoint_path(tmp_path, 7)) for _ in range(3)}
    assert len(folders) == 3 and {target_of(folder) for folder in folders} == {checkpoint_path(tmp_path, 7)}


def test_parts_are_about_as_large_and_each_tensor_is_in_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(content, "PART_BYTES", 1000)
    sizes = (400, 300, 300, 200, 200, 100, 100, 50)
    every = Content(
        weights={f"w{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}, tied={},
        moments={f"m/w{i}": torch.zeros(size) for i, size in enumerate(sizes)}, parameters={},
    )  # fmt: skip
    assert [parts_of(every, ranks) for ranks in (1, 3, 100)] == [1, 3, 8]
    parts = [own_part(every, part, 3, copy=True) for part in range(3)]
    names = [name for part in parts for name in [*part.weights, *part.moments]]
    assert sorted(names) == sorted([*every.weights, *every.moments])
    assert max(part.bytes for part in parts) <= min(part.bytes for part in parts) + 2 * 4 * 100
    assert own_part(every, None, 3, copy=True).bytes == 0
    own = own_part(every, 0, 3, copy=False)
    assert all(tensor is every.weights[name] for name, tensor in own.weights.items())
    assert [part_of(rank, 8, 2) for rank in range(8)] == [0, None, None, None, 1, None, None, None]
    assert [part_of(rank, 3, 3) for rank in range(3)] == [0, 1, 2]


def on_two_ranks(world: World) -> dict[str, Any]:
    content.PART_BYTES, found = 1, {}
    with own_folders(world) as folder:
        if world.main:
            tiny_config(folder)  # writes the text
        dist.barrier()
        for strategy in ("ddp", "fsdp"):
            config = tiny_config(folder, *SAVING, f"parallel={strategy}", "steps=4", run=strategy)
            Trainer(config, world, Console(enabled=False)).run()
            config = tiny_config(folder, *SAVING, f"parallel={strategy}", "steps=6", run=strategy)
            Trainer(config, world, Console(enabled=False)).run()
            files = files_of(folder / strategy, 6)
            found[strategy] = sorted(files)
            found[f"{strategy}_bytes"] = files
        content.PART_BYTES = 1 << 29
        config = tiny_config(folder, *SAVING, "steps=6", run="one")
        Trainer(config, world, Console(enabled=False)).run()
        content.PART_BYTES = 1
        checkpoints = [open_checkpoint(folder / run) for run in ("ddp", "one")]
        parts, one = (checkpoint.load_model_state() for checkpoint in checkpoints)
        found["same"] = parts.keys() == one.keys() and all(torch.equal(parts[name], one[name]) for name in one)
        found["names"] = sum(len(load_file(path)) for path in checkpoints[0].path.glob("model-*"))
        found["names_of_one"] = len(load_file(checkpoints[1].path / "model.safetensors"))
        config = tiny_config(folder, *SAVING, f"resume={folder / 'ddp'}", "steps=7", run="on")
        config.checkpoint.every = 7
        write = FolderWriter.write_tensors
        if world.rank == 1:
            FolderWriter.write_tensors = _full  # type: ignore[method-assign]
        with pytest.raises(CheckpointError) as refused:
            Trainer(config, world, Console(enabled=False)).run()
        FolderWriter.write_tensors = write  # type: ignore[method-assign]
        found["refused"] = str(refused.value)
        dist.barrier()
        found["left"] = sorted(path.name for path in (folder / "on" / "checkpoints").iterdir())
        saver.ABORT_SECONDS = 1.0
        if world.rank == 1:
            FolderWriter.write = _slowly  # type: ignore[method-assign]
        config = tiny_config(folder, *SAVING, run="failing")
        with pytest.raises(ZeroDivisionError):
            Trainer(config, world, Failing(enabled=False)).run()
        FolderWriter.write = write_pieces  # type: ignore[method-assign]
        dist.barrier()
        found["failing"] = sorted(path.name for path in (folder / "failing" / "checkpoints").iterdir())
        if world.main:
            result = tiny_train(folder, *SAVING, f"resume={folder / 'fsdp'}", "steps=7", run="alone")
            found["alone"] = result.finished, sorted(files_of(folder / "alone", 7))
    return found


def _full(*_arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


write_pieces = FolderWriter.write


def _slowly(self: FolderWriter, name: str, pieces: Iterator[bytes | memoryview]) -> None:
    """Takes some seconds for a part."""
    write_pieces(self, name, (piece for piece in pieces if time.sleep(0.1) is None))


class Failing(Console):
    """An error of every rank while the first checkpoint is being written."""

    def step(self, row, eta_seconds) -> None:
        if row["step"] == 3:
            raise ZeroDivisionError


def test_ranks_write_parts_and_one_that_cannot_is_everyones_error(tmp_path: Path):
    one, two = run_ranks(on_two_ranks, 2, tmp_path)
    names = [f"{stem}-{part:05d}-of-00002.safetensors" for stem in ("model", "optimizer") for part in (1, 2)]
    assert one["ddp"] == one["fsdp"] == names and one["ddp_bytes"] == one["fsdp_bytes"]
    assert one["same"] and one["names"] == one["names_of_one"]
    assert one["refused"] == two["refused"]
    assert one["refused"].startswith("on rank 1, not on rank 0: checkpoint ") and "No space left" in one["refused"]
    assert one["left"] == []
    assert one["failing"] == ["step_00000002"], "rank 1 was still writing its part"
    assert one["alone"] == (True, ["model.safetensors", "optimizer.safetensors"])
