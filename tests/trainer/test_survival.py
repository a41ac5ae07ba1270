"""What must not end a run, nor lose what it has trained."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8train.checkpoint import find_resume, open_checkpoint, saved_steps
from fp8train.distributed import World
from fp8train.errors import CheckpointError, DivergedError, TrainingError
from fp8train.metrics import read_metrics
from fp8train.trainer import Trainer
from fp8train.trainer.blackbox import FolderWriter
from fp8train.trainer.console import Console
from fp8train.trainer.run_lock import LOCK_FILE, lock_run_folder
from fp8train.trainer.saver import Saver
from tests.checkpoint.tiny_checkpoint import save
from tests.source_tree import ROOT
from tests.tiny_run import tiny_arguments, tiny_config, tiny_train


class Poisoned(Trainer):
    """A NaN in a weight before step 7."""

    def _step(self, stop: bool):
        if self.progress.step == 6:
            with torch.no_grad():
                self.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
        return super()._step(stop)


def test_run_that_diverges_keeps_the_checkpoints_of_before(tmp_path):
    settings = ("steps=30", "checkpoint.every=2", "checkpoint.keep_last=2", "data.holdout_fraction=0")
    config = tiny_config(tmp_path, *settings, "optim.max_nonfinite_steps=8", "checkpoint.minutes=1e-9")
    with pytest.raises(DivergedError):
        Poisoned(config, World(), Console(enabled=False)).run()
    assert saved_steps(tmp_path / "run") == [5, 6]
    state = find_resume(tmp_path / "run", "auto").load_model_state()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert tiny_train(tmp_path, *settings).finished, "the same command goes on from there"


class Stopping(Console):
    """Asks to stop while step 7, which is not finite, is shown."""

    def step(self, row, eta_seconds) -> None:
        if row["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)


def test_run_that_is_stopped_amid_such_steps_removes_no_checkpoint(tmp_path):
    settings = ("steps=30", "checkpoint.every=2", "checkpoint.keep_last=2", "data.holdout_fraction=0")
    result = Poisoned(tiny_config(tmp_path, *settings), World(), Stopping(enabled=False)).run()
    assert result.stopped_by == "SIGTERM" and saved_steps(tmp_path / "run") == [4, 6, 8]


@pytest.mark.parametrize("where", ["closed pipe", "full disk"])
def test_console_that_cannot_be_written_to_does_not_end_the_run(where, tmp_path):
    command = [sys.executable, "-m", "fp8train", "train", *tiny_arguments(tmp_path, "steps=8", "log.print_every=1")]
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, os.fdopen(writing, "w") as pipe:
        output = pipe if where == "closed pipe" else full
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: standard output cannot be written") == 1 and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["finished"]


def test_lock_of_another_run_is_left_alone(tmp_path):
    with lock_run_folder(tmp_path / "run") as check:
        check()
        shutil.rmtree(tmp_path / "run")
        with lock_run_folder(tmp_path / "run") as other:
            with pytest.raises(CheckpointError, match="run is not this run's any more: it has been removed, renamed"):
                check()
            other()
            ours = (tmp_path / "run" / LOCK_FILE).stat().st_ino
    assert ours and not (tmp_path / "run" / LOCK_FILE).exists()


def test_end_of_a_run_whose_folder_went_to_another_leaves_that_ones_lock(tmp_path):
    with lock_run_folder(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / LOCK_FILE).write_text("another's")
    assert (tmp_path / "run" / LOCK_FILE).read_text() == "another's"


class Removing(Console):
    """Removes the run folder while step 3 is shown."""

    folder: Path

    def step(self, row, eta_seconds) -> None:
        if row["step"] == 3:
            self.folder.rename(self.folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("every", "error", "words"),
    [
        (1, TrainingError, "has been removed or renamed.*the row of step 3 is lost"),
        (100, CheckpointError, "it has been removed, renamed or given to another run"),
    ],
    ids=["at the next row", "at the next checkpoint"],
)
def test_run_whose_folder_is_gone_says_so_and_makes_no_other(every, error, words, tmp_path):
    console = Removing(enabled=False)
    console.folder = tmp_path / "run"
    with pytest.raises(error, match=words):
        tiny_train(tmp_path, f"log.every={every}", "data.holdout_fraction=0", console=console)
    assert not (tmp_path / "run").exists()


def test_lost_terminal_saves_and_stops(tmp_path):
    class HangingUp(Console):
        def step(self, row, eta_seconds) -> None:
            if row["step"] == 2:
                os.kill(os.getpid(), signal.SIGHUP)

    result = tiny_train(tmp_path, console=HangingUp(enabled=False))
    assert result.stopped_by == "SIGHUP" and saved_steps(tmp_path / "run") == [3]


def test_black_box_without_room_is_announced_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *_arguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Listening(Console):
        said: list[str] = []

        def info(self, text: str) -> None:
            self.said.append(text)

    class Breaking(Poisoned):
        def _step(self, stop: bool):
            result = super()._step(stop)
            with torch.no_grad():
                self.model.layers[0].mlp.up_proj.weight.nan_to_num_()
            return result

    monkeypatch.setattr(FolderWriter, "write_tensors", full)
    monkeypatch.setattr(Saver, "save", lambda *_arguments: None)
    console = Listening(enabled=False)
    config = tiny_config(tmp_path, "steps=9", "data.holdout_fraction=0")
    assert Breaking(config, World(), console).run().finished
    assert any("step_00000007 cannot be written (No space left" in line for line in console.said)
    assert list((tmp_path / "run" / "blackbox").iterdir()) == []


@pytest.mark.parametrize("left", ["old", "both"])
def test_save_of_the_same_step_that_was_killed_between_its_renames_is_taken_back(left, tmp_path):
    path = save(tmp_path, 20)
    if left == "both":
        shutil.copytree(path, path.with_name(f".{path.name}.ffffffff.tmp"))
    path.rename(path.with_name(f".{path.name}.old.tmp"))
    half = path.with_name(".step_00000030.00000000.tmp")
    half.mkdir()
    (half / "model.safetensors").write_text("cut off")
    assert find_resume(tmp_path, "auto") is None, "whoever does not hold the folder changes nothing"
    assert find_resume(tmp_path, "auto", recover=True).step == 20
    assert open_checkpoint(tmp_path).path == path
    assert list(path.parent.iterdir()) == [path], "what is half-written takes no room from those to come"


def test_rows_that_a_machine_lost_are_missed(tmp_path):
    class Listening(Console):
        said: list[str] = []

        def info(self, text: str) -> None:
            self.said.append(text)

    tiny_train(tmp_path, "steps=6", "log.every=2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = metrics.read_text().splitlines(keepends=True)[:1]
    metrics.write_text("".join(kept))
    console = Listening(enabled=False)
    tiny_train(tmp_path, "steps=8", "log.every=2", console=console)
    assert "warning: metrics.jsonl: the rows of steps 3 to 6 are missing" in console.said
    whole = Listening(enabled=False)
    whole.said = []
    tiny_train(tmp_path, "steps=4", run="whole")
    tiny_train(tmp_path, "steps=9", "log.every=5", run="whole", console=whole)
    tiny_train(tmp_path, "steps=10", "log.every=2", run="whole", console=whole)
    tiny_train(tmp_path, "steps=12", f"resume={tmp_path / 'whole'}", run="fork", console=whole)
    assert not any("missing" in line for line in whole.said)


def test_machine_that_goes_down_after_the_last_evaluation_keeps_its_row(tmp_path, monkeypatch):
    on_disk, real = [], os.fsync

    def synced(descriptor: int) -> None:
        real(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "metrics.jsonl":
            on_disk.append(path.read_text())

    monkeypatch.setattr(os, "fsync", synced)
    tiny_train(tmp_path, "steps=2")
    assert on_disk[-1] == (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "eval_loss" in on_disk[-1].splitlines()[-1]


def test_line_that_is_not_utf8_is_named_by_its_number(tmp_path):
    rows = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 4))
    (tmp_path / "m.jsonl").write_bytes(rows.encode() + b"\xff\xfe\n")
    with pytest.raises(CheckpointError, match="line 4 is damaged"):
        read_metrics(tmp_path / "m.jsonl")


@pytest.mark.parametrize("killed_at", [4, 8], ids=["amid the steps", "after the last"])
def test_kill_while_text_is_scored_costs_no_step_and_no_row(tmp_path, killed_at):
    class Killed(Trainer):
        def _evaluate(self) -> None:
            if self.progress.step == killed_at:
                raise MemoryError
            super()._evaluate()

    options = ("steps=8", "eval.every=4", "checkpoint.every=4")
    with pytest.raises(MemoryError):
        Killed(tiny_config(tmp_path, *options), World(), Console(enabled=False)).run()
    assert saved_steps(tmp_path / "run")[-1] == killed_at
    one, two = tiny_train(tmp_path, *options), tiny_train(tmp_path, *options, run="straight")
    assert [row["step"] for row in one.evals] == [row["step"] for row in two.evals]
    assert one.evals[-1]["eval_loss"] == two.evals[-1]["eval_loss"] and one.stream_hash == two.stream_hash


def test_stop_at_a_step_that_is_to_be_evaluated_saves_first(tmp_path):
    saved_before: list[list[int]] = []

    class Slow(Trainer):
        def _evaluate(self) -> None:
            saved_before.append(saved_steps(self.run_dir))
            super()._evaluate()

    class Ending(Console):
        def step(self, row, eta_seconds) -> None:
            if row["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    config = tiny_config(tmp_path, "steps=8", "eval.every=4")
    result = Slow(config, World(), Ending(enabled=False)).run()
    assert result.stopped_by == "SIGTERM" and saved_before == [[4]]
    assert [row["step"] for row in result.evals] == [4]


def test_files_that_are_not_ours_stay_and_are_not_read(tmp_path):
    (tmp_path / "run").mkdir()
    foreign = tmp_path / "run" / "config.until_step_old.yaml"
    foreign.write_text("mine")
    tiny_train(tmp_path, "steps=1")
    assert foreign.read_text() == "mine"
