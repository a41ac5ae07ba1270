"""Checkpoints that the clock asks for: there is always one to go on from, and no number of a run changes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fp8train.checkpoint import checkpoint_path, open_checkpoint, saved_steps
from fp8train.checkpoint.writing import finish
from fp8train.config import load_config
from fp8train.distributed import World
from fp8train.errors import ConfigError
from fp8train.metrics import read_metrics
from fp8train.trainer import Trainer
from fp8train.trainer.console import Console
from fp8train.trainer.progress import Progress
from fp8train.trainer.saving import SaveClock, checkpoints_to_come
from tests.tiny_run import tiny_config, tiny_train

AT_ONCE = "checkpoint.minutes=1e-9"
TIMES = (
    "tokens_per_second", "step_seconds", "process_step", "data_seconds", "memory_bytes", "eval_seconds",
)  # fmt: skip


def rows(run_dir: Path) -> list[dict]:
    """Metrics without what the clock and the allocator decide."""
    kept = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in kept]


class Dying(Console):
    """An end without a last checkpoint, while a step is being shown."""

    def __init__(self, at_step: int) -> None:
        super().__init__(enabled=False)
        self._at_step = at_step

    def step(self, row, eta_seconds) -> None:
        if row["step"] == self._at_step:
            raise SystemExit


class TestSaveClock:
    def test_is_due_so_many_minutes_after_the_last_checkpoint(self, monkeypatch: pytest.MonkeyPatch):
        now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        clock = SaveClock(2.0)
        now += 119
        assert not clock.due
        now += 1
        assert clock.due
        clock.restart()
        assert not clock.due

    def test_null_is_never(self, monkeypatch: pytest.MonkeyPatch):
        clock = SaveClock(None)
        monkeypatch.setattr(time, "monotonic", lambda: 1e12)
        assert not clock.due


def test_half_an_hour_is_the_default_and_zero_is_refused():
    assert load_config([]).checkpoint.minutes == 30
    with pytest.raises(ConfigError, match=r"checkpoint.minutes: got 0.0; needs more than 0, or null"):
        load_config(["checkpoint.minutes=0"])


def test_run_that_dies_goes_on_from_what_the_clock_had_written(tmp_path: Path):
    with pytest.raises(SystemExit):
        tiny_train(tmp_path, AT_ONCE, console=Dying(5))
    assert saved_steps(tmp_path / "run") == [3, 4]
    tiny_train(tmp_path)
    tiny_train(tmp_path, run="whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_clock_adds_checkpoints_and_changes_no_number(tmp_path: Path):
    for run, options in (("with", (AT_ONCE, "checkpoint.keep_last=9")), ("without", ("checkpoint.minutes=null",))):
        tiny_train(tmp_path, "eval.every=2", "micro_batch_samples=4", *options, run=run)
    assert saved_steps(tmp_path / "with") == [1, 2, 3, 4, 5, 6] and saved_steps(tmp_path / "without") == [6]
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (checkpoint_path(tmp_path / run, 6) / name for run in ("with", "without"))
        assert one.read_bytes() == other.read_bytes()


def test_clock_starts_again_with_a_checkpoint_by_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    restarts = []
    monkeypatch.setattr(SaveClock, "restart", lambda clock: restarts.append(clock))
    tiny_train(tmp_path, "checkpoint.every=2")
    assert len(restarts) == 3 and open_checkpoint(tmp_path / "run").step == 6


class TestRoom:
    @pytest.mark.parametrize(
        ("options", "number"),
        [
            pytest.param(("checkpoint.minutes=null",), 1, id="the last"),
            pytest.param((), 3, id="two by the clock and the last"),
            pytest.param(("steps=2",), 2, id="no more than steps"),
            pytest.param(("checkpoint.every=5", "checkpoint.minutes=null"), 2, id="one by steps and the last"),
            pytest.param(("checkpoint.every=2", "checkpoint.minutes=null"), 3, id="all"),
            pytest.param(("checkpoint.every=1", "checkpoint.keep_last=1"), 2, id="the one before"),
            pytest.param(("checkpoint.every=1", "checkpoint.keep_every=2", "checkpoint.keep_last=1"), 4, id="for good"),
        ],
    )
    def test_is_what_the_disk_holds_when_it_holds_most(
        self, options: tuple[str, ...], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Against a run whose clock is always due, with a look at the disk while each checkpoint is written."""
        config = tiny_config(tmp_path, *options)
        assert checkpoints_to_come(config, Progress(), [], alarm=False) == number
        held = []

        def looked(folder, run_dir, *args):
            held.append(len(saved_steps(run_dir)) + 1)
            return finish(folder, run_dir, *args)

        monkeypatch.setattr("fp8train.trainer.saver.finish", looked)
        if config.checkpoint.minutes is not None:
            config.checkpoint.minutes = 1e-9
        Trainer(config, World(), Console(enabled=False)).run()
        assert max(held) == number

    @pytest.mark.parametrize(
        ("there", "step", "number"), [([2], 2, 2), ([2, 3], 3, 1), ([1, 2, 3], 3, 1), ([5], 5, 1)], ids=str
    )
    def test_is_less_by_what_is_there(self, there: list[int], step: int, number: int, tmp_path: Path):
        config = tiny_config(tmp_path)
        assert checkpoints_to_come(config, Progress(step=step), there, alarm=False) == number

    @pytest.mark.parametrize(
        ("options", "number"), [((), 4), (("checkpoint.every=2",), 4), (("checkpoint.minutes=null",), 2)], ids=str
    )
    def test_has_place_for_what_an_alarm_goes_back_to(self, options: tuple[str, ...], number: int, tmp_path: Path):
        assert checkpoints_to_come(tiny_config(tmp_path, *options), Progress(), [], alarm=True) == number
