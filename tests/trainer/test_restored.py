from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fp8train.calibration_setup import set_up
from fp8train.checkpoint import open_checkpoint
from fp8train.comparison.crossing import crossed_losses
from fp8train.distributed import World
from fp8train.errors import CheckpointError
from fp8train.eval import score_checkpoint
from fp8train.nn.weights import named_linears
from fp8train.quant.formats import LinearPrecision
from fp8train.recipe import load_recipe
from fp8train.sensitivity import SensitivityArguments
from fp8train.trainer import Trainer
from fp8train.trainer.alarm_watcher import AlarmWatcher
from fp8train.trainer.changed_run import evaluation_config
from fp8train.trainer.console import Console
from fp8train.trainer.restored import restored
from tests.test_generate import MODEL, save_run
from tests.tiny_run import tiny_config, tiny_train

CPU = torch.device("cpu")
CHANGING = {"schedule": {"schedule": [{"at": 0.5, "use": "bf16"}]}, "demotion": {"alarm": {"on": ["nonfinite"]}}}


def precisions(model: torch.nn.Module) -> dict[str, LinearPrecision]:
    return {fqn: linear.precision for fqn, linear in named_linears(model).items()}


def train(folder: Path, patch: pytest.MonkeyPatch, options: dict[str, Any]) -> Trainer:
    """A finished run under `blockwise` with a schedule, or with an alarm that sounds once, after step 2."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(load_recipe("blockwise").document | options))
    patch.setattr(AlarmWatcher, "_cause", lambda self, _: "planted" if self._losses and not self._demotions else None)
    trainer = Trainer(tiny_config(folder, f"recipe={path}", "steps=4"), World(), Console(enabled=False))
    trainer.run()
    return trainer


@pytest.fixture(params=CHANGING.values(), ids=CHANGING.keys())
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A finished run whose last precisions are not those of its rules."""
    return train(tmp_path, monkeypatch, request.param)


class TestRunThatLeftItsRules:
    def test_model_has_the_precisions_of_the_last_step(self, run: Trainer) -> None:
        checkpoint = open_checkpoint(run.run_dir)
        own = precisions(run.model)
        assert precisions(restored(checkpoint, CPU).model) == own
        assert precisions(restored(checkpoint, CPU, recipe=checkpoint.recipe).model) != own, "the rules, as asked"

    def test_eval_scores_what_the_run_scored(self, run: Trainer) -> None:
        checkpoint = open_checkpoint(run.run_dir)
        row = score_checkpoint(checkpoint, evaluation_config(checkpoint, [], "eval"), World())
        assert row["eval_loss"] == pytest.approx(run.evals[-1]["eval_loss"], rel=1e-6)  # sums over other batches

    def test_crossed_evaluation_takes_its_arithmetic_whole(self, run: Trainer, tmp_path: Path) -> None:
        own = run.evals[-1]["eval_loss"]
        assert crossed_losses(run.run_dir, {"own": run.run_dir}, World()) == {"own": own}
        tiny_train(tmp_path, "steps=4", run="plain")
        found = crossed_losses(run.run_dir, {"plain": tmp_path / "plain"}, World())
        assert found["plain"] != own, "all of the rules' linears in FP8"


def test_crossed_evaluation_follows_the_other_run_not_the_one_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduled = train(tmp_path, monkeypatch, CHANGING["schedule"])
    tiny_train(tmp_path, "steps=4", "recipe=bf16", run="bf16")
    plain = tiny_train(tmp_path, "steps=4", run="plain")
    found = crossed_losses(tmp_path / "plain", {"tail": scheduled.run_dir, "bf16": tmp_path / "bf16"}, World())
    assert found["tail"] == found["bf16"] == plain.evals[-1]["eval_loss_bf16"]


def test_sensitivity_judges_what_is_in_fp8_at_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path, monkeypatch, CHANGING["demotion"])
    demoted = open_checkpoint(run.run_dir).state.progress["watchers"]["alarm"]["demoted"]
    given = [f"checkpoint={run.run_dir}", "windows=2"]
    *_, followed = set_up(given, SensitivityArguments, "sensitivity")
    *_, asked = set_up([*given, "recipe=blockwise"], SensitivityArguments, "sensitivity")
    assert demoted and set(asked.candidates) - set(followed.candidates) == set(demoted)


@pytest.mark.parametrize(("recipe", "precision"), [("bf16", "bf16"), ("blockwise", "fp8"), ("fp32", "fp32")])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_model_is_restored_in_the_precision_of_its_run(recipe: str, precision: str, tied: bool, tmp_path: Path) -> None:
    trained = save_run(tmp_path, recipe, dataclasses.replace(MODEL, tie_embeddings=tied))
    model = restored(open_checkpoint(tmp_path), CPU).model
    assert model.layers[0].mlp.up_proj.precision.name == precision
    assert model(torch.tensor([[1]])).dtype == (torch.float32 if recipe == "fp32" else torch.bfloat16)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path: Path) -> None:
    save_run(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.state.config["model"]["num_layers"] = 2
    with pytest.raises(CheckpointError, match=r"layers\.1\."):
        restored(checkpoint, CPU)


def test_configuration_of_a_stranger_reads_nothing_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    address = "https://example.org/${oc.env:WANDB_API_KEY}.jsonl"  # its server would be told
    save_run(tmp_path, kind="hf", path=address, hf_name="json")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.data.path == address
    assert evaluation_config(checkpoint, ["seq_len=8"], "eval").data.path == address


def test_choice_of_ones_own_refers_to_what_it_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path)
    monkeypatch.setenv("CORPUS", "a.txt")
    monkeypatch.setattr("fp8train.trainer.changed_run.folder", lambda name: tmp_path / name)
    (tmp_path / "configs" / "data").mkdir(parents=True)
    (tmp_path / "configs" / "data" / "mine.yaml").write_text("{kind: text, path: '${oc.env:CORPUS}'}")
    changes = ["data=mine", "data.holdout_fraction=0.01", "data.eval_windows=${seq_len}", "seq_len=8"]
    data = evaluation_config(open_checkpoint(tmp_path), changes, "eval").data
    assert (data.path, data.eval_windows) == ("a.txt", 8)
