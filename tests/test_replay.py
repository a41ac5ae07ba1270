from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from fp8train import replay
from fp8train.backends.cpu import CpuBackend
from fp8train.checkup import rerun
from fp8train.checkup.rerun import OWN, Rerun
from fp8train.data import Batch, Batcher
from fp8train.data.packing import Sample
from fp8train.distributed import World
from fp8train.errors import exit_code
from fp8train.optim import OptimConfig
from fp8train.recipe import load_recipe
from fp8train.trainer import Trainer, loop
from fp8train.trainer.console import Console
from tests.tiny_run import tiny_config

NONFINITE, SPIKE = 3, 14  # steps that go wrong
QUICK = ("data.holdout_fraction=0", "micro_batch_samples=4")


def run(folder: Path, before: Callable[[Trainer, int], None], *overrides: str) -> Path:
    """Run folder of a tiny run that something was done to: `before(trainer, step)`, steps counted from 1."""

    class Interrupted(Trainer):
        def _step(self, stop: bool):
            before(self, self.progress.step + 1)
            return super()._step(stop)

    Interrupted(tiny_config(folder, *QUICK, *overrides), World(), Console(enabled=False)).run()
    return folder / "run"


def cause(run_dir: Path, tmp_path: Path) -> dict:
    out = tmp_path / "verdict.json"
    assert replay.main([str(run_dir), f"out={out}"]) == 0
    return json.loads(out.read_text())


@pytest.fixture
def faulty_product(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """FP8 products gain `add` while it is set: a kernel that goes wrong at some point."""
    fault: dict[str, float] = {}
    scaled_mm = CpuBackend.scaled_mm

    def product(self: CpuBackend, *args: object) -> Tensor:
        y = scaled_mm(self, *args)  # type: ignore[arg-type]
        return y + fault["add"] if fault else y

    monkeypatch.setattr(CpuBackend, "scaled_mm", product)
    return fault


@pytest.mark.parametrize(("add", "step"), [(math.nan, NONFINITE), (3.0, SPIKE)], ids=["nan", "spike"])
def test_fault_of_the_fp8_product_is_called_fp8_numerics(
    add: float,
    step: int,
    tmp_path: Path,
    faulty_product: dict[str, float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def plant(trainer: Trainer, number: int) -> None:
        if number == step:
            faulty_product["add"] = add

    run_dir = run(tmp_path, plant, f"steps={step}", "checkpoint.every=10")
    if step == SPIKE:  # the fault is in this step alone; replay takes the steps before again, from a checkpoint
        train = rerun.train_step
        faulty_product.clear()

        def replayed(model: nn.Module, optimizer: torch.optim.Optimizer, *args: object, **options: object) -> object:
            faulty_product.update({} if isinstance(optimizer, torch.optim.AdamW) else {"add": add})
            return train(model, optimizer, *args, **options)

        monkeypatch.setattr(rerun, "train_step", replayed)
    found = cause(run_dir, tmp_path)
    assert found["cause"] == "FP8 numerics" and found["step"] == step
    text = capsys.readouterr().out
    assert "cause: FP8 numerics" in text
    if step == NONFINITE:
        assert found["where"] == ["layers.0.self_attn.q_proj is the first whose output is not finite"]
    else:
        assert "step_00000010, 3 steps on" in text


def test_fault_that_is_gone_is_called_non_reproducible(tmp_path: Path, faulty_product: dict[str, float]) -> None:
    def plant(trainer: Trainer, number: int) -> None:
        faulty_product.clear()
        if number == NONFINITE:
            faulty_product["add"] = math.nan

    run_dir = run(tmp_path, plant, f"steps={NONFINITE + 1}")
    assert cause(run_dir, tmp_path)["cause"] == "non-reproducible"


def test_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    def plant(trainer: Trainer, number: int) -> None:
        if number == NONFINITE:
            with torch.no_grad():
                trainer.model.layers[0].mlp.up_proj.weight[0, 0] = math.inf

    run_dir = run(tmp_path, plant, f"steps={NONFINITE}")
    found = cause(run_dir, tmp_path)
    assert found["cause"] == "weights" and found["where"] == ["layers.0.mlp.up_proj.weight"]


def test_sequences_that_are_noise_are_called_data_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_of = Batcher.batch_of

    def with_noise(self: Batcher, samples: Sequence[Sample], indices: list[int]) -> Batch:
        made = batch_of(self, samples, indices)
        for row, index in enumerate(indices):
            if index // 8 == SPIKE - 1 and index % 8 in (2, 3, 5):  # three sequences of one step
                generator = torch.Generator().manual_seed(index)
                made.tokens[row] = torch.randint(0, 256, made.tokens[row].shape, generator=generator)
                made.targets[row] = torch.randint(0, 256, made.targets[row].shape, generator=generator)
        return made

    monkeypatch.setattr(Batcher, "batch_of", with_noise)
    run_dir = run(tmp_path, lambda trainer, number: None, f"steps={SPIKE}")
    found = cause(run_dir, tmp_path)
    assert found["cause"] == "data"
    first = (SPIKE - 1) * 8
    assert sorted(place.split()[1] for place in found["where"]) == [str(first + k) for k in (2, 3, 5)]
    assert any("first weights of seed 1, 13 steps on" in note for note in found["notes"])


def test_weights_that_have_diverged_are_no_fault_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leap(config: OptimConfig, step: int, steps: int) -> float:
        return 0.3 if step == SPIKE - 2 else 3e-3  # one step of a hundred times the rate

    monkeypatch.setattr(loop, "learning_rate", leap)
    monkeypatch.setattr(rerun, "learning_rate", leap)
    run_dir = run(tmp_path, lambda trainer, number: None, f"steps={SPIKE}")
    found = cause(run_dir, tmp_path)
    assert found["cause"] == "weights" and "diverged" in found["because"]


def test_replay_of_a_sound_step_gives_its_loss_to_the_bit(tmp_path: Path) -> None:
    def plant(trainer: Trainer, number: int) -> None:
        box = next(watcher for watcher in trainer.watchers if watcher.name == "blackbox")
        if number == SPIKE:
            box._history = [0.01 * (k % 3) + 0.1 for k in range(30)]  # anything is a spike against these

    run_dir = run(tmp_path, plant, f"steps={SPIKE}", "checkpoint.every=8", "checkpoint.keep_last=9")
    again = Rerun(run_dir / "blackbox" / f"step_{SPIKE:08d}", World())
    measured = again.measure(OWN)
    assert (measured.loss, measured.grad_norm) == (again.dump.loss, again.dump.grad_norm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["{folder}"], "holds no black box", id="no dump"),
        pytest.param([], "path is not given", id="no path"),
        pytest.param(["{folder}/missing"], "holds no black box", id="no folder"),
        pytest.param(["path={folder}", "pth=1"], "unknown key", id="unknown key"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(replay.main, [argument.format(folder=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_weights_that_other_settings_led_to_are_not_made_up(
    tmp_path: Path, faulty_product: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """What training again from the first weights gives is another run's, and would be called non-reproducible."""

    def plant(trainer: Trainer, number: int) -> None:
        if number == SPIKE:
            faulty_product["add"] = 3.0

    run(tmp_path, lambda *_: None, "steps=6", "checkpoint.keep_last=1")
    run_dir = run(tmp_path, plant, f"steps={SPIKE}", "checkpoint.keep_last=1")
    assert exit_code(replay.main, [str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert "steps 1 to 6 were trained with other settings (config.until_step_6.yaml)" in error
    assert "needs a checkpoint of later" in error


@pytest.mark.parametrize("alarm_at", [SPIKE, 11], ids=["the step's own alarm", "an alarm before it"])
def test_a_step_under_an_alarm_is_replayed_in_the_precisions_that_it_had(alarm_at: int, tmp_path: Path) -> None:
    """The black box is of the first attempt; the checkpoint that the alarm went back to may not know of it."""
    recipe = tmp_path / "alarm.yaml"
    recipe.write_text(yaml.safe_dump(load_recipe("blockwise").document | {"alarm": {"on": ["nonfinite"]}}))
    done: list[int] = []

    def plant(trainer: Trainer, number: int) -> None:
        box = next(watcher for watcher in trainer.watchers if watcher.name == "blackbox")
        alarm = next(watcher for watcher in trainer.watchers if watcher.name == "alarm")
        if number == SPIKE:
            box._history = [0.01 * (k % 3) + 0.1 for k in range(30)]
        if number == alarm_at and not done:
            done.append(number)
            alarm._cause = lambda result: "told to"
            alarm._innocent = lambda result: None
        else:
            vars(alarm).pop("_cause", None)

    run_dir = run(
        tmp_path, plant, f"steps={SPIKE + 1}", "checkpoint.every=8", "checkpoint.keep_last=9", f"recipe={recipe}"
    )
    again = Rerun(run_dir / "blackbox" / f"step_{SPIKE:08d}", World())
    assert bool(again.dump.precisions) == (alarm_at < SPIKE)
    measured = again.measure(OWN)
    assert (measured.loss, measured.grad_norm) == (again.dump.loss, again.dump.grad_norm)
