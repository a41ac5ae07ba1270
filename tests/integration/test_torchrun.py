from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fp8train.checkpoint.files import read_tensors
from fp8train.metrics import read_metrics
from fp8train.recipe import load_recipe
from fp8train.trainer.blackbox import WEIGHTS_FILE, read_dump
from tests.full_disk import files_of_at_most
from tests.golden.runs import SPREADS, in_spreads
from tests.integration import breaking_run, one_step
from tests.perturbed_run import losses
from tests.tiny_run import padded_metrics, tiny_arguments, tiny_train

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 512
# 256 tokens a rank: whole blocks of 128 tokens, so that wgrad's codes are those of one rank
STEPS = ("steps=24", "checkpoint.every=12", "eval.every=12")  # as many as the golden runs have


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Two ranks on this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *command]
    return subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_two_ranks_give_the_gradients_of_one(tmp_path: Path):
    arguments = tiny_arguments(
        tmp_path, "recipe=deepseek_v3"
    )  # FP32 scales: a block that is cut in two changes its codes
    one_step.main([str(tmp_path / "one.pt"), *arguments])
    done = torchrun("tests.integration.one_step", str(tmp_path / "two.pt"), *arguments)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert two["loss"] == pytest.approx(one["loss"], rel=TOKENS * 2**-24)
    for name, gradient in one["gradients"].items():
        # The codes are the same, the FP32 sums over n tokens are in another order: at most n roundings of 2^-24 each.
        # One code that differs would show as 2^-4 of an element.
        difference = (two["gradients"][name] - gradient).norm() / gradient.norm()
        assert difference <= TOKENS * 2**-24, name


def test_two_ranks_train_like_one(tmp_path: Path):
    one = tiny_train(tmp_path, *STEPS, run="one")
    done = torchrun("fp8train.train", *tiny_arguments(tmp_path, *STEPS, run="two"))
    assert done.returncode == 0, done.stderr

    # the same but for the order of FP32 sums
    assert in_spreads(losses(tmp_path / "two"), "blockwise", losses(tmp_path / "one")).max() <= SPREADS

    assert done.stdout.count("step 24/24") == 1, "rank 0 alone writes"
    rows = [row for row in read_metrics(tmp_path / "two" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 25))

    # the folder of two ranks goes on with one, on the same stream
    resumed = tiny_train(tmp_path, *STEPS, "steps=25", run="two")
    straight = tiny_train(tmp_path, *STEPS, "steps=25", run="one")
    assert resumed.finished and resumed.stream_hash == straight.stream_hash != one.stream_hash


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_agree_on_going_back_and_each_keeps_its_part_of_the_step(tmp_path: Path, strategy: str):
    """One rank alone has a NaN in a weight: all go back, demote nothing, and the black box has every micro-batch."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(load_recipe("blockwise").document | {"alarm": {"on": ["nonfinite"]}}))
    arguments = tiny_arguments(tmp_path, f"recipe={recipe}", f"parallel={strategy}", "steps=6", "checkpoint.every=3")
    done = torchrun("tests.integration.breaking_run", str(tmp_path / "ranks.json"), *arguments)
    assert done.returncode == 0, done.stderr

    one, two = json.loads((tmp_path / "ranks.json").read_text())
    assert one == two
    high = {fqn for fqn, precision in one["precisions"].items() if precision == "bf16"}
    assert high == {"lm_head"}
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"], event["returned_to"]) == ("return", breaking_run.BAD_STEP, 3)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and all(row["loss"] is not None for row in rows)

    box = tmp_path / "run" / "blackbox" / f"step_{breaking_run.BAD_STEP:08d}"
    dump, ranks = read_dump(box)
    assert dump.world_size == len(ranks) == 2
    weights, _ = read_tensors(box / WEIGHTS_FILE)
    assert list(weights[f"{breaking_run.BAD_LINEAR}.weight"].shape) == [256, 128], "the rows of every rank"
    samples = [{number for batch in rank.batches for number in batch.sample_ids} for rank in ranks]
    first = (breaking_run.BAD_STEP - 1) * 8  # sequences a step
    assert samples[0] | samples[1] == set(range(first, first + 8)) and not samples[0] & samples[1]


def test_metrics_that_rank_0_cannot_write_end_every_rank(tmp_path: Path):
    metrics = padded_metrics(tmp_path)
    with files_of_at_most(metrics.stat().st_size + 50):
        done = torchrun("fp8train.train", *tiny_arguments(tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("fp8train: failed: ") == 1 and "the row of step 4 cannot be written" in done.stderr
    assert "another rank is gone" not in done.stderr, "both ranks raise what rank 0 met"


@pytest.mark.parametrize("command", [["fp8train.train"], ["fp8train", "train"]], ids=" ".join)
def test_error_of_the_configuration_is_shown_once(tmp_path: Path, command: list[str]):
    done = torchrun(*command, *tiny_arguments(tmp_path, "recipe=blockwize"))
    assert done.returncode != 0
    assert done.stderr.count("fp8train: error: ") == 1
    assert "RecipeError: " in done.stderr.partition("Root Cause (first observed failure):")[2]
    assert not (tmp_path / "run").exists()


def test_error_of_one_ranks_configuration_ends_all(tmp_path: Path):
    """A folder that one machine alone has."""
    (tmp_path / "groups0").mkdir()
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from fp8train.distributed import rank_exit_code\n"
        "from fp8train.train import main\n"
        "sys.argv.append('--config-dir=' + sys.argv.pop(1) + os.environ['RANK'])\n"
        "raise SystemExit(rank_exit_code(main))\n"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(
        [*start, str(tmp_path / "groups"), *tiny_arguments(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"fp8train: error: on rank 1, not on rank 0: train: --config-dir got '{tmp_path}/groups1'" in done.stderr
    assert not (tmp_path / "run").exists()
