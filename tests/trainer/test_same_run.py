"""Whether the run of a folder is the one that is asked for, when it is finished and when it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fp8train.errors import CheckpointError, ConfigError
from tests.tiny_run import tiny_train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run of six steps, with a checkpoint after three."""
    folder = tmp_path_factory.mktemp("trained")
    result = tiny_train(folder, "checkpoint.every=3", "eval.every=3")
    return SimpleNamespace(folder=folder, run_dir=folder / "run", result=result)


@pytest.fixture
def copied(trained: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the finished run's parent folder, free to be changed."""
    shutil.copytree(trained.folder, tmp_path / "copy")
    return tmp_path / "copy"


class TestFinished:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            pytest.param("seed=9", "finished run with seed=1, this one has seed=9.*another run_dir", id="seed"),
            pytest.param("recipe=bf16", r"recipe=blockwise \(\w{12}\), this one has recipe=bf16 \(", id="recipe"),
            pytest.param("model.num_layers=2", "model.num_layers=1, this one has model.num_layers=2", id="model"),
            pytest.param("optim.lr=1", "optim.lr=0.003, this one has optim.lr=1.0", id="learning rate"),
            pytest.param("optim.clip_grad_norm=null", "clip_grad_norm=1.0, .*clip_grad_norm=null", id="null"),
            pytest.param("data.path=/missing.txt", "data.path=.*this one has data.path=/missing.txt", id="data"),
            pytest.param("steps=5", "steps=6, this one has steps=5", id="fewer steps"),
        ],
    )
    def test_finished_run_is_not_reported_for_another(self, trained: SimpleNamespace, override: str, message: str):
        with pytest.raises(ConfigError, match=message):
            tiny_train(trained.folder, "checkpoint.every=3", "eval.every=3", override)

    def test_finished_run_is_the_same_by_another_name_of_its_recipe_and_another_log(
        self, trained: SimpleNamespace, tmp_path: Path
    ):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text((trained.run_dir / "recipe.yaml").read_text())
        options = (f"recipe={recipe}", "log.every=2", "time_limit_seconds=60")
        assert tiny_train(trained.folder, "eval.every=3", *options) == trained.result


class TestGoingOn:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            pytest.param("seed=2", "seed is 2, the checkpoint .* has 1", id="seed"),
            pytest.param("data.document_mask=true", "data.document_mask is True", id="data"),
            pytest.param("model.rope_theta=5e5", "model.rope_theta", id="model"),
            pytest.param("global_batch_tokens=1024", "global_batch_tokens is 1024", id="batch"),
        ],
    )
    def test_checkpoint_of_another_run_is_refused(self, copied: Path, override: str, message: str):
        with pytest.raises(ConfigError, match=message):
            tiny_train(copied, "steps=8", f"data.path={copied / 'text.txt'}", override)

    def test_changed_text_is_refused(self, copied: Path):
        text = copied / "text.txt"
        text.write_text(text.read_text().replace("alpha", "omega"))
        with pytest.raises(ConfigError, match="the data is"):
            tiny_train(copied, "steps=8")

    def test_recipe_change_needs_permission(self, copied: Path):
        with pytest.raises(CheckpointError, match="allow_recipe_change"):
            tiny_train(copied, "steps=7", "recipe=bf16")
        assert tiny_train(copied, "steps=7", "recipe=bf16", "checkpoint.allow_recipe_change=true").finished

    def test_fewer_steps_than_done_is_refused(self, copied: Path):
        (copied / "run" / "result.json").unlink()
        with pytest.raises(ConfigError, match="steps: got 4, the checkpoint .* is at 6"):
            tiny_train(copied, "steps=4")
