from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fp8train.checkpoint.random_state import random_state
from fp8train.distributed import World
from fp8train.errors import CheckpointError
from fp8train.metrics import read_metrics
from fp8train.trainer import Trainer
from fp8train.trainer.blackbox import read_dump, tensor_statistics
from fp8train.trainer.console import Console
from tests.tiny_run import tiny_config, tiny_train

QUICK = ("steps=6", "data.holdout_fraction=0")


class Breaking(Trainer):
    """Puts a NaN into a weight before step 4, and takes it out again before step 5."""

    def _step(self, stop: bool):
        step, weight = self.progress.step + 1, self.model.layers[0].mlp.up_proj.weight
        with torch.no_grad():
            if step == 4:
                self.kept, weight[0, 0] = weight[0, 0].clone(), float("nan")
                self.before = {name: p.clone() for name, p in self.model.named_parameters()}
                self.random = random_state()
            if step == 5:
                weight[0, 0] = self.kept
        return super()._step(stop)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Breaking]:
    """Run folder and trainer of a run whose step 4 is not finite."""
    folder = tmp_path_factory.mktemp("blackbox")
    trainer = Breaking(tiny_config(folder, *QUICK), World(), Console(enabled=False))
    trainer.run()
    return folder / "run", trainer


def test_step_that_is_not_finite_is_written_down_with_its_tokens_weights_and_generators(
    broken: tuple[Path, Breaking],
) -> None:
    run_dir, trainer = broken
    (path,) = (run_dir / "blackbox").iterdir()
    dump, (rank,) = read_dump(path)
    assert path.name == "step_00000004"
    assert (dump.step, dump.kind, dump.loss, dump.weights, len(dump.history)) == (4, "nonfinite", None, True, 3)
    expected = trainer.batcher.micro_batches(3)
    assert [batch.sample_ids for batch in rank.batches] == [batch.sample_ids for batch in expected]
    assert all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
        for a, b in zip(rank.batches, expected, strict=True)
    )
    assert rank.random_state == trainer.random
    weights = load_file(path / "model.safetensors")
    assert weights.keys() == trainer.before.keys()
    assert all(torch.equal(weights[k].nan_to_num(7.0), v.nan_to_num(7.0)) for k, v in trainer.before.items())
    assert dump.statistics["parameters"]["layers.0.mlp.up_proj.weight"]["nonfinite"] == 1
    assert dump.statistics["micro_batches"][0]["sample_ids"] == expected[0].sample_ids


def test_row_of_the_step_and_the_console_say_so(broken: tuple[Path, Breaking]) -> None:
    rows = [row for row in read_metrics(broken[0] / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if "blackbox" in row] == [4]


def test_sound_run_writes_nothing(tmp_path: Path) -> None:
    tiny_train(tmp_path, *QUICK)
    assert not (tmp_path / "run" / "blackbox").exists()


def test_number_of_dumps_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poisoned(Trainer):
        def _build(self) -> None:
            super()._build()
            with torch.no_grad():
                self.model.norm.weight.fill_(math.nan)

    for keep, wanted in ((0, 0), (4, 1)):  # silence for a window after a dump
        config = tiny_config(tmp_path, *QUICK, "steps=4", f"blackbox.keep={keep}", run=str(keep))
        Poisoned(config, World(), Console(enabled=False)).run()
        folder = tmp_path / str(keep) / "blackbox"
        assert len(list(folder.iterdir()) if folder.exists() else []) == wanted


def test_state_survives_a_resume(tmp_path: Path) -> None:
    first = Trainer(tiny_config(tmp_path, *QUICK), World(), Console(enabled=False))
    first.run()
    second = Trainer(tiny_config(tmp_path, *QUICK, "steps=7"), World(), Console(enabled=False))
    second.run()
    states = [next(w.state() for w in t.watchers if w.name == "blackbox") for t in (first, second)]
    assert len(states[0]["history"]) == 6 and states[1]["history"][:6] == states[0]["history"]


def test_statistics_leave_out_what_is_not_finite_and_count_it() -> None:
    found = tensor_statistics(torch.tensor([3.0, -4.0, math.nan, math.inf]))
    assert found == {"amax": 4.0, "rms": 2.5, "nonfinite": 2}


def test_damaged_dump_is_one_line(broken: tuple[Path, Breaking], tmp_path: Path) -> None:
    copy = tmp_path / "step_00000004"
    shutil.copytree(broken[0] / "blackbox" / "step_00000004", copy)
    (copy / "rank_0000.json").unlink()
    with pytest.raises(CheckpointError, match="rank_0000.json"):
        read_dump(copy)
    (copy / "dump.json").write_text('{"step": 1}')
    with pytest.raises(CheckpointError, match="no whole black box"):
        read_dump(copy)
