"""Parameters sharded over two ranks (parallel=fsdp), against replicated ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8train.checkpoint import open_checkpoint
from fp8train.distributed import World
from fp8train.distributed.sharding import shard_bytes
from fp8train.metrics import read_metrics
from fp8train.models import build_model
from fp8train.recipe import load_recipe
from fp8train.telemetry.table import SECONDS_KEY
from fp8train.trainer.assembly import assemble
from tests.integration.sharded_run import CASES, SHAPE, TREATED
from tests.tiny_run import tiny_config, tiny_text, tiny_train

ROOT = Path(__file__).resolve().parents[2]
FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    tiny_text(path)
    for name, beside in TREATED.items():
        (path / f"{name}.yaml").write_text(json.dumps(load_recipe("blockwise").document | beside), encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, "-m", "tests.integration.sharded_run", str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict:
    return json.loads((folder / "cases.json").read_text())


def step_rows(run: Path) -> list[dict]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_replicated_ranks_bit_for_bit(outcomes, case):
    """A sum of two is the same in any order, and codes are made from the whole master whatever rows a rank holds."""
    outcome = outcomes[case]
    assert outcome["gradients"] >= 20 and outcome["different"] == []
    assert outcome["losses"][0] == outcome["losses"][1]


def test_remedies_for_outliers_do_something_in_those_steps(outcomes):
    assert outcomes["clamped"]["losses"] != outcomes["selective"]["losses"]
    for case, outcome in outcomes.items():
        if case in CASES:
            assert outcome["scales"] == ([1.0, 2.0] if case.startswith("smooth") else []), case


def test_gradients_of_micro_batches_are_summed_over_ranks_one_by_one(outcomes):
    """In another order than replicated ranks: four FP32 terms, each sum of which rounds by at most 2^-24 of it."""
    outcome = outcomes["accumulated"]
    assert 0 < outcome["apart"] <= 4 * 2**-24
    assert outcome["losses"][0] == outcome["losses"][1]


def test_telemetry_of_compiled_layers_has_every_rank_join(outcomes):
    seen = outcomes["telemetry"]
    assert {"fp8/layers.1.mlp.down_proj/w", "fp8/layers.0.self_attn.q_proj/dy"} <= set(seen)


def test_first_weights_are_rank_0s(outcomes):
    hashes = outcomes["first_weights"]
    assert len(hashes["seed"]) == 3 and len(set(hashes["seed"])) == 1
    assert len(hashes["folder"]) == 2 and len(set(hashes["folder"])) == 1
    assert len(hashes["damaged"]) == 2 and all("model.safetensors" in message for message in hashes["damaged"])


def test_a_rank_holds_half_of_the_parameters_and_no_codes(outcomes):
    for outcome in map(outcomes.get, CASES):
        assert sum(outcome["local_numel"]) == outcome["numel"]
        assert max(outcome["local_numel"]) < 0.51 * outcome["numel"]
        assert not outcome["master_is_alive"] and not outcome["holds_codes"]


@pytest.mark.parametrize("kind", ["", "_bf16", "_smooth"], ids=["fp32", "bf16", "smooth"])
def test_training_writes_the_checkpoint_of_replicated_ranks(folder, kind):
    """Without clipping every operation on weights and moments is by element, so the bytes are the same."""
    for step in (3, 6):
        for name in FILES:
            replicated, sharded = (
                folder / f"{strategy}{kind}" / "checkpoints" / f"step_{step:08d}" / name for strategy in ("ddp", "fsdp")
            )
            assert replicated.read_bytes() == sharded.read_bytes(), (step, name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_clock_of_one_rank_saves_on_all_of_them(folder, strategy):
    """checkpoint.minutes were over on rank 1 only, after each step; the last two checkpoints are kept."""
    saved = folder / f"clock_{strategy}" / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["step_00000003", "step_00000004"]
    for name in FILES:
        expected = folder / strategy / "checkpoints" / "step_00000003" / name
        assert (saved / "step_00000003" / name).read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("kind", ["", "_smooth"], ids=["plain", "smooth"])
def test_losses_evaluations_and_telemetry_are_the_same(folder, kind):
    replicated, sharded = (read_metrics(folder / f"{strategy}{kind}/metrics.jsonl") for strategy in ("ddp", "fsdp"))
    assert len(replicated) == len(sharded) == 6 + 3
    for one, other in zip(replicated, sharded, strict=True):
        assert one.keys() == other.keys()
        seen = [key for key in one if key.startswith("fp8/") and key != SECONDS_KEY]
        for key in ("loss", "eval_loss", "eval_loss_bf16", "eval_tokens", "fp8_flops_share", *seen):
            assert one.get(key) == other.get(key), (one["step"], key)
    assert {"fp8/layers.0.mlp.up_proj/x", "fp8/layers.0.mlp.down_proj/w"} <= replicated[1].keys()


def test_clipping_takes_the_norm_over_all_ranks(folder):
    (replicated,), (sharded,) = (step_rows(folder / f"clipped_{strategy}") for strategy in ("ddp", "fsdp"))
    assert replicated["grad_norm"] > 0.1  # so that it clips
    # the norm of each piece of 2^14 elements is FP32, of at most 2^14 / 16 roundings in a lane of sixteen, then FP64
    assert sharded["grad_norm"] == pytest.approx(replicated["grad_norm"], rel=2**10 * 2**-24)
    one, other = (open_checkpoint(folder / f"clipped_{strategy}").load_model_state() for strategy in ("ddp", "fsdp"))
    for name, weight in one.items():  # AdamW's first step divides the factor out again, but for eps
        assert (weight - other[name]).abs().max() <= 3e-3 * 2**-9, name


@pytest.mark.parametrize("kind", ["", "_smooth"], ids=["plain", "smooth"])
@pytest.mark.parametrize("run", ["stopped", "whole"])
def test_a_run_that_was_stopped_or_keeps_layers_whole_is_the_same_bit_for_bit(folder, run, kind):
    for name in FILES:
        straight, other = (folder / f"{each}{kind}/checkpoints/step_00000006" / name for each in ("fsdp", run))
        assert straight.read_bytes() == other.read_bytes()


def test_one_process_goes_on_from_the_checkpoint_of_sharded_ranks(folder):
    result = tiny_train(folder, *SHAPE, "steps=7", "optim=adamw_constant", "parallel=fsdp", run="fsdp_bf16")
    assert result.finished and result.steps == 7 and result.world_size == 1


def test_result_says_what_a_rank_holds(folder):
    replicated, sharded, masters = (
        json.loads((folder / run / "result.json").read_text())["memory_bytes"]
        for run in ("ddp", "fsdp", "whole_smooth")
    )
    model = build_model(tiny_config(folder, *SHAPE).model, "meta")
    expected = shard_bytes((parameter.shape for parameter in model.parameters()), 2, 4)
    assert sharded["weights"] == sharded["gradients"] == expected < 0.51 * replicated["weights"]
    report = assemble(tiny_config(folder, *SHAPE), World().device).report
    layers = [row for row in report.rows if row.fqn != "lm_head"]  # which is in BF16 and gathered so
    codes = shard_bytes((torch.Size(row.shape) for row in layers), 2, 1)
    scales = sum(row.scale_bytes for row in layers)  # of what was sent, and of what came
    assert sharded["weight_copies"] == codes + scales < replicated["weight_copies"]
    assert masters["weight_copies"] == report.copy_bytes([row.fqn for row in layers]) > 0  # lm_head's, which is kept
    assert sharded["moments"] < 0.51 * replicated["moments"]


def test_compiled_layers_give_the_gradients_of_eager_ones(outcomes):
    outcome = outcomes["compiled"]
    # FP32 throughout: inductor's sums over 128 to 512 numbers are in another order, which is at most 512 roundings
    assert 0 < outcome["apart"] <= 512 * 2**-24
    assert outcome["graphs"] == 2 and outcome["graph_breaks"] == 0
    assert not outcome["holds_codes"] and not outcome["master_is_alive"]


def test_dynamo_may_compile_every_layer(folder):
    config = tiny_config(folder, "parallel=fsdp", "compile=true", "model.num_layers=10")
    with torch._dynamo.config.patch(recompile_limit=8):  # not monkeypatch: it deletes the name when it is done
        assemble(config, World().device, world_size=2)
        assert torch._dynamo.config.recompile_limit >= 10 + 8
