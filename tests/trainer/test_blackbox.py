from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fp8train.checkpoint.random_state import random_state
from fp8train.distributed import World
from fp8train.errors import CheckpointError
from fp8train.metrics import read_metrics
from fp8train.trainer import Trainer
from fp8train.trainer.assembly import assemble
from fp8train.trainer.blackbox import BlackBox, read_dump, tensor_statistics
from fp8train.trainer.console import Console
from fp8train.trainer.step import StepResult
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


def watched(tmp_path: Path, *overrides: str) -> tuple[BlackBox, list[str]]:
    """A black box whose dumps are not written, and its warnings."""
    warnings: list[str] = []
    config = tiny_config(tmp_path, *QUICK, *overrides)
    assembly = assemble(config, torch.device("cpu"))
    box = BlackBox(config, assembly, World(), tmp_path, warnings.append)
    box._write = lambda path, *rest: path.mkdir(parents=True)  # type: ignore[assignment,method-assign]
    return box, warnings


def fed(box: BlackBox, losses: list[float], norms: list[float] | None = None, first: int = 1) -> list[int]:
    """Steps at which there was a dump."""
    found = []
    for step, loss in enumerate(losses, start=first):
        norm = 1.0 if norms is None else norms[step - first]
        result = StepResult(loss=loss, grad_norm=norm, valid_tokens=1, updated=math.isfinite(loss), stop=False)
        found += [step] if box.after_step(step, result) else []
    return found


def noisy(level: float, count: int, seed: int = 0) -> list[float]:
    return (level * (1 + 0.01 * np.random.default_rng(seed).standard_normal(count))).tolist()


def test_a_level_that_holds_is_the_usual_one_and_a_leap_above_it_is_seen(tmp_path: Path) -> None:
    box, warnings = watched(tmp_path)
    losses = [*noisy(3.0, 200), *noisy(3.6, 200, 1), 9.0, *noisy(3.6, 20, 2)]
    assert fed(box, losses) == [201, 401]
    assert any("step 221: more than 40% of the last 50 losses lay far above" in text for text in warnings)


def test_beyond_keep_the_newest_dump_takes_the_place_of_the_newest_and_they_become_rare(tmp_path: Path) -> None:
    box, _ = watched(tmp_path, "blackbox.keep=3", "blackbox.window=20")
    losses = noisy(3.0, 400)
    for step in range(50, 400, 5):
        losses[step] = 9.0
    assert fed(box, losses) == [51, 71, 91, 111, 151, 231, 391]
    assert sorted(path.name for path in (tmp_path / "blackbox").iterdir()) == [
        "step_00000051", "step_00000071", "step_00000391",
    ]  # fmt: skip


def test_a_gradient_norm_that_leaps_is_said_once_in_a_window(tmp_path: Path) -> None:
    box, warnings = watched(tmp_path)
    norms = [2.0 + 0.5 * (n % 3) for n in range(120)]
    usual = math.exp(sum(map(math.log, norms[10:60])) / 50)
    norms[60] = norms[70] = 4e8
    assert fed(box, noisy(3.0, 120), norms) == []
    assert warnings == [f"step 61: gradient norm 4e+08 before clipping, usually {usual:.3g}"]


def test_a_step_that_is_made_again_keeps_its_first_dump(tmp_path: Path) -> None:
    box, _ = watched(tmp_path)
    box.before_step(1, [])
    assert fed(box, [*noisy(3.0, 30), 9.0]) == [31]
    before = box.state()
    box.roll_back(20, {"history": before["history"][:20]})
    assert fed(box, [*noisy(3.0, 10), 9.0], first=21) == []
    assert box.state()["dumps"] == 1 and box.state()["newest"] == "step_00000031"


def test_a_run_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    warnings: list[str] = []
    config = tiny_config(tmp_path, *QUICK)
    box = BlackBox(config, assemble(config, torch.device("cpu")), World(), tmp_path / "gone", warnings.append)
    box.before_step(1, [])
    assert fed(box, [math.nan]) == []
    assert not (tmp_path / "gone").exists() and "cannot be written" in warnings[0]
