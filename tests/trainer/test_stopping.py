"""Ctrl-C: the first saves and stops (tests/trainer/test_loop.py, as any signal does), the second aborts."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8train.checkpoint import open_checkpoint
from fp8train.trainer import stopping
from fp8train.trainer.console import Console
from fp8train.trainer.stopping import StopRequest
from tests.source_tree import ROOT
from tests.tiny_comparison import TINY
from tests.tiny_run import tiny_train


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal has it, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Pressing(Console):
    """Ctrl-C twice while a step is being shown."""

    def __init__(self, at_step: int) -> None:
        self.lines = io.StringIO()
        super().__init__(6, stream=self.lines)
        self._at_step = at_step

    def step(self, row, eta_seconds) -> None:
        if row["step"] == self._at_step:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("at_step", "left"),
    [(2, "aborted: nothing saved in {run}"), (5, "aborted: the same command goes on from step 4")],
    ids=["before a checkpoint", "after one"],
)
def test_second_press_aborts_and_says_what_is_left(
    at_step: int, left: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    console = Pressing(at_step)
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, "checkpoint.every=4", console=console)
    assert console.lines.getvalue().splitlines()[-1] == left.format(run=tmp_path / "run")
    assert capfd.readouterr().err.count("press again to abort") == 1


def test_ignored_interrupt_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason is None


@pytest.fixture
def received() -> Iterator[list[int]]:
    """SIGTERM and SIGUSR1 that had their own effect."""
    numbers, found = (signal.SIGTERM, signal.SIGUSR1), list[int]()
    before = [signal.signal(number, lambda number, _frame: found.append(number)) for number in numbers]
    yield found
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def send(*numbers: signal.Signals) -> None:
    """All of them at once: they wait until the last is sent.

    To this thread: one sent to a process whose main thread blocks it goes to another thread, which takes its time.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        signal.pthread_kill(threading.get_ident(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_two_signals_at_once_stop_by_the_first_and_none_is_lost(
    second: signal.Signals, received: list[int], monkeypatch: pytest.MonkeyPatch
):
    lost = list[object]()
    monkeypatch.setattr(sys, "unraisablehook", lost.append)  # where Python says that a signal had no handler left
    with StopRequest(tell=False) as stop:
        send(signal.SIGINT, second)
        assert (stop.reason, received) == ("SIGINT", [])
    assert not lost


def test_what_a_scheduler_and_torchrun_send_is_one_request_and_later_ones_act(
    received: list[int], monkeypatch: pytest.MonkeyPatch
):
    now = 1000.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert (stop.reason, received) == ("SIGUSR1", [])
        now += stopping.SAME_SECONDS
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.reason, received) == ("SIGUSR1", [signal.SIGTERM])


def test_whoever_asks_is_the_reason_unless_a_signal_came():
    who = "nobody"
    with StopRequest(asked=lambda: None if who == "nobody" else who) as stop:
        assert stop.reason is None
        who = "its comparison"
        assert stop.reason == "its comparison"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_first_press_saves_every_run_of_a_parallel_comparison(tmp_path: Path):
    arguments = [*TINY, "steps=100000", "compare.parallel=2", f"run_dir={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "fp8train", "compare", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        runs = [tmp_path / "out" / "arms" / arm / "seed_1" for arm in ("bf16", "blockwise")]
        deadline = time.monotonic() + 300
        while not all((run / "metrics.jsonl").exists() for run in runs):
            assert process.poll() is None and time.monotonic() < deadline, "a run ended or hung before its first step"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and its children
        output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "Traceback" not in error and error.count("press again to abort") == 1
    assert "comparison stopped: 0 of 2 runs are finished" in output and "aborted" not in output
    assert all(f"stopped by SIGINT after step {open_checkpoint(run).step} of" in output for run in runs)
