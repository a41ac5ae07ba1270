from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp8train import cli, train
from fp8train.checkpoint import open_checkpoint
from fp8train.errors import exit_code
from tests.tiny_run import tiny_arguments

ROOT = Path(__file__).resolve().parent.parent


class TestCli:
    def test_help_lists_every_command_with_its_purpose(self, capsys: pytest.CaptureFixture[str]):
        assert cli.main(["--help"]) == 0
        text = capsys.readouterr().out
        assert all(name in text and purpose in text for name, purpose in cli.COMMANDS.items())

    def test_every_command_is_a_module_that_runs(self):
        for name in cli.COMMANDS:
            text = (ROOT / "fp8train" / f"{name}.py").read_text(encoding="utf-8")
            assert "def main(argv" in text and '__name__ == "__main__"' in text, name

    @pytest.mark.parametrize(("given", "nearest"), [("trian", "train"), ("comparre", "compare"), ("evaluate", "eval")])
    def test_unknown_command_exits_2_and_names_the_nearest(
        self, given: str, nearest: str, capsys: pytest.CaptureFixture[str]
    ):
        assert exit_code(cli.main, [given]) == 2
        error = capsys.readouterr().err
        assert f"unknown command '{given}'; nearest: {nearest}" in error and error.count("\n") == 1

    def test_command_gets_the_arguments_after_its_name(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", *tiny_arguments(tmp_path), "--cfg", "job"])
        assert caught.value.code == 0
        assert "global_batch_tokens: 512" in capsys.readouterr().out

    def test_one_rank_is_told_that_fsdp_shards_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        for strategy in ("ddp", "fsdp"):
            command = tiny_arguments(tmp_path, "steps=1", f"parallel={strategy}", f"run_dir={tmp_path / strategy}")
            assert cli.main(["train", *command]) == 0
            told = "parallel=fsdp on one rank shards nothing" in capsys.readouterr().out
            assert told == (strategy == "fsdp")


class TestBadInput:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            pytest.param("stepz=3", "unknown key 'stepz'; nearest: steps", id="key"),
            pytest.param("recipe=blockwize", "recipe is 'blockwize'.*blockwise", id="recipe"),
            pytest.param("backend=gpu", "backend: 'gpu' is not known; needs one of", id="backend"),
            pytest.param("global_batch_tokens=500", "Nearest: global_batch_tokens=512", id="batch"),
            pytest.param("data.path=/nonexistent.txt", "/nonexistent.txt", id="data"),
            pytest.param("resume=/nonexistent", "/nonexistent", id="checkpoint"),
            pytest.param("run_dir=/proc/run", "run_dir: /proc/run cannot be written to", id="read-only folder"),
        ],
    )
    def test_exits_2_with_one_line_and_leaves_nothing(
        self, override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        assert exit_code(train.main, [*tiny_arguments(tmp_path), override]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("held_out", "loss"), [("0.1", "held-out"), ("0", "training")], ids=["held out", "nothing held out"]
)
def test_run_that_ends_in_nan_exits_1_also_when_it_is_asked_for_again(
    held_out: str, loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ("steps=2", "optim.lr=1e38", "optim.clip_grad_norm=null", f"data.holdout_fraction={held_out}")
    for _ in range(2):
        assert exit_code(train.main, tiny_arguments(tmp_path, *options)) == 1
        error = capsys.readouterr().err
        assert f"the {loss} loss of" in error and "not finite after step 2" in error and error.count("\n") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["finished"] is True
    assert open_checkpoint(tmp_path / "run").step == 2


def test_sigterm_to_the_command_saves_and_exits_0(tmp_path: Path):
    arguments = tiny_arguments(tmp_path, "steps=100000")
    command = [sys.executable, "-m", "fp8train", "train", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "run" / "metrics.jsonl", process)
        os.kill(process.pid, signal.SIGTERM)
        output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "Traceback" not in error
    done = open_checkpoint(tmp_path / "run").step
    assert f"stopped by SIGTERM after step {done} of 100000" in output.splitlines()[-1]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["finished"], result["steps"]) == (False, done)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the file has content: training is under way."""
    deadline = time.monotonic() + 300
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hung before its first step"
        time.sleep(0.05)
