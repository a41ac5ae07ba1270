"""One live run in one folder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fp8train.errors import CheckpointError
from fp8train.trainer import run_lock
from fp8train.trainer.run_lock import LOCK_FILE, lock_run_folder


def hold(folder: Path, pipe: Connection) -> None:
    """Hold a folder until the other end of the pipe says something."""
    with lock_run_folder(folder):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds tmp_path until it is ended, and the pipe to it; forked: torch is imported already."""
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert pipe.recv() == "held"
    yield process, pipe
    process.kill()
    process.join()


def test_second_live_run_is_refused_and_told_who_holds_the_folder(tmp_path, other_process):
    want = f"in use by process {other_process[0].pid} on {socket.gethostname()}"
    with pytest.raises(CheckpointError, match=want), lock_run_folder(tmp_path):
        pass


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_folder_is_free_when_its_run_is_gone(tmp_path, other_process, how):
    process, pipe = other_process
    process.kill() if how == "killed" else pipe.send("end")
    process.join()
    with lock_run_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}


def test_folder_is_made_and_nothing_stays_behind(tmp_path):
    with lock_run_folder(tmp_path / "a" / "b"):
        pass
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_what_a_killed_run_was_writing_goes_and_all_else_stays(tmp_path):
    writer = """
import os, signal, sys
from pathlib import Path
from fp8train.whole_file import whole_file
with whole_file(Path(sys.argv[1])) as file:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "metrics.jsonl").write_text("rows")
    (tmp_path / ".notes.tmp").write_text("the user's")
    done = subprocess.run([sys.executable, "-c", writer, str(tmp_path / "metrics.jsonl")], check=False)
    assert done.returncode == -9 and len(list(tmp_path.iterdir())) == 3
    with lock_run_folder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", ".notes.tmp"}


def test_error_inside_releases_the_folder(tmp_path):
    with pytest.raises(RuntimeError), lock_run_folder(tmp_path):
        raise RuntimeError
    with lock_run_folder(tmp_path):
        pass


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written to"), lock_run_folder(tmp_path / "file" / "run"):
        pass


class TestWithoutFlock:
    """A file system that has no flock: process id and host in the file decide."""

    @pytest.fixture(autouse=True)
    def no_flock(self, monkeypatch):
        def refuse(descriptor, operation):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        monkeypatch.setattr(run_lock.fcntl, "flock", refuse)

    @staticmethod
    def _held_by(tmp_path, **holder):
        (tmp_path / LOCK_FILE).write_text(json.dumps(holder))

    def test_free_folder_is_taken(self, tmp_path):
        with lock_run_folder(tmp_path):
            assert (tmp_path / LOCK_FILE).exists()

    def test_live_process_holds_it(self, tmp_path):
        self._held_by(tmp_path, pid=os.getppid(), host=socket.gethostname())
        with pytest.raises(CheckpointError, match=f"process {os.getppid()}"), lock_run_folder(tmp_path):
            pass

    def test_dead_process_does_not(self, tmp_path):
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        self._held_by(tmp_path, pid=process.pid, host=socket.gethostname())
        with lock_run_folder(tmp_path):
            pass

    def test_process_of_another_host_holds_it_until_the_file_is_deleted(self, tmp_path):
        self._held_by(tmp_path, pid=1, host="elsewhere")
        with pytest.raises(CheckpointError, match="on elsewhere.*delete"), lock_run_folder(tmp_path):
            pass

    def test_file_that_was_not_finished_holds_nothing(self, tmp_path):
        (tmp_path / LOCK_FILE).write_text('{"pid"')
        with lock_run_folder(tmp_path):
            pass
