from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from fp8train.checkpoint import open_checkpoint
from fp8train.metrics import read_metrics
from fp8train.trainer import assembly
from fp8train.trainer.console import Console
from tests.tiny_run import tiny_train

TIMES = (
    "tokens_per_second", "step_seconds", "process_step", "data_seconds", "memory_bytes", "eval_seconds",
)  # fmt: skip


def rows(run_dir: Path) -> list[dict]:
    """Metrics without what the clock and the allocator decide."""
    kept = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in kept]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = open_checkpoint(run_dir).path
    found = {name: load_file(path / f"{name}.safetensors") for name in ("model", "optimizer")}
    return {f"{file}/{name}": tensor for file, content in found.items() for name, tensor in content.items()}


def assert_same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (open_checkpoint(one).path / file).read_bytes() == (open_checkpoint(other).path / file).read_bytes()


@pytest.mark.parametrize("recipe", ["blockwise", "deepseek_v3", "bf16"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(recipe: str, tmp_path: Path):
    options = (f"recipe={recipe}", "checkpoint.every=3", "eval.every=2", "micro_batch_samples=4")
    whole = tiny_train(tmp_path, *options, run="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000006")
    (tmp_path / "resumed" / "result.json").unlink()
    resumed = tiny_train(tmp_path, *options, run="resumed")
    assert_same(tmp_path / "whole", tmp_path / "resumed")
    assert resumed.stream_hash == whole.stream_hash
    assert resumed.evals[0]["step"] == 2 and len(resumed.evals) == len(whole.evals) == 3


def test_resumed_run_draws_no_weights_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = tiny_train(tmp_path, "steps=2", "optim=adamw_constant")
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "first_values", lambda *_arguments: pytest.fail("drawn to be thrown away"))
        resumed = tiny_train(tmp_path, "steps=3", "optim=adamw_constant")
    straight = tiny_train(tmp_path, "steps=3", "optim=adamw_constant", run="straight")
    assert resumed.init_hash == first.init_hash == straight.init_hash != ""
    assert resumed.final_train_loss == straight.final_train_loss


def died_early(whole: Path, died: Path) -> None:
    """A copy of a finished run as it was before its first checkpoint."""
    shutil.copytree(whole, died, dirs_exist_ok=True)
    shutil.rmtree(died / "checkpoints")
    (died / "result.json").unlink()


def test_run_that_died_before_its_first_checkpoint_starts_over_says_so_and_keeps_its_record(tmp_path: Path):
    options = ("steps=4",)
    tiny_train(tmp_path, *options, run="whole")
    record = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for number in (1, 2):
        died_early(tmp_path / "whole", tmp_path / "died")
        lines = io.StringIO()
        tiny_train(tmp_path, *options, "log.every=2", run="died", console=Console(stream=lines))
        name = f"metrics-{number}.jsonl"
        said = f"no checkpoint in {tmp_path / 'died'}: starts at step 0; the earlier metrics.jsonl is kept as {name}"
        assert lines.getvalue().count(f"warning: {said}\n") == 1
        assert (tmp_path / "died" / name).read_bytes() == record
        config = yaml.safe_load((tmp_path / "died" / f"config-{number}.yaml").read_text())
        assert config["log"]["every"] == 1
    tiny_train(tmp_path, *options, run="other")
    died_early(tmp_path / "other", tmp_path / "again")
    tiny_train(tmp_path, *options, run="again")
    assert_same(tmp_path / "whole", tmp_path / "again")


def test_run_that_goes_on_from_a_checkpoint_sets_nothing_aside(tmp_path: Path):
    lines = io.StringIO()
    tiny_train(tmp_path, "steps=2")
    tiny_train(tmp_path, "steps=4", console=Console(stream=lines))
    assert not list((tmp_path / "run").glob("*-1.*")) and "is kept as" not in lines.getvalue()


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path):
    options = ("checkpoint.every=2", "steps=4")
    tiny_train(tmp_path, *options, run="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / "step_00000004" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    (tmp_path / "damaged" / "result.json").unlink()
    tiny_train(tmp_path, *options, run="damaged")
    assert_same(tmp_path / "whole", tmp_path / "damaged")
