"""Whether the run of a folder is the one that is asked for, when it is finished and when it goes on."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fp8train.checkpoint.files import MARKER
from fp8train.errors import CheckpointError, ConfigError
from fp8train.recipe import load_recipe
from fp8train.trainer.console import Console
from tests.tiny_run import tiny_train


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


def kept(run_dir: Path) -> dict[str, float]:
    """Name -> learning rate of the configurations in a run folder."""
    return {path.name: yaml.safe_load(path.read_text())["optim"]["lr"] for path in run_dir.glob("config*.yaml")}


def seal(file: Path) -> None:
    """Make a checkpoint whole again whose file was changed."""
    marker = file.parent / MARKER
    content = json.loads(marker.read_text())
    content["files"][file.name] = {"bytes": file.stat().st_size, "crc32": f"{zlib.crc32(file.read_bytes()):08x}"}
    marker.write_text(json.dumps(content))


def go_on(copied: Path, *overrides: str) -> str:
    """Train on in the copied folder, with the data where it was; gives the console's lines."""
    lines = io.StringIO()
    data = yaml.safe_load((copied / "run" / "config.yaml").read_text())["data"]["path"]
    options = (f"data.path={data}", "checkpoint.every=3", "checkpoint.keep_last=9", "eval.every=3", *overrides)
    tiny_train(copied, *options, console=Console(stream=lines))
    return lines.getvalue()


class TestChangedSettings:
    def test_each_is_told_and_the_earlier_configuration_stays(self, copied: Path):
        output = go_on(copied, "steps=9", "optim.lr=0.01", "log.every=2")
        assert "\noptim.lr: 0.003 -> 0.01 from step 7\n" in output and "\nsteps: 6 -> 9 from step 7\n" in output
        assert output.count(" from step 7\n") == 2
        assert kept(copied / "run") == {"config.until_step_6.yaml": 0.003, "config.yaml": 0.01}
        go_on(copied, "steps=10", "optim.lr=0.02")
        assert kept(copied / "run") == {
            "config.until_step_6.yaml": 0.003, "config.until_step_9.yaml": 0.01, "config.yaml": 0.02
        }  # fmt: skip

    def test_another_strategy_and_another_number_of_ranks_are_told(self, copied: Path):
        state = copied / "run" / "checkpoints" / "step_00000006" / "state.json"
        content = json.loads(state.read_text())
        content["random_states"] *= 2
        state.write_text(json.dumps(content))
        seal(state)
        output = go_on(copied, "steps=7", "parallel=fsdp")
        told = [line for line in output.splitlines() if line.endswith(" from step 7")]
        assert told == [
            "steps: 6 -> 7 from step 7", "parallel.strategy: ddp -> fsdp from step 7", "ranks: 2 -> 1 from step 7"
        ]  # fmt: skip

    def test_the_environment_of_the_steps_before_stays_where_it_was_another(self, copied: Path):
        file, kept_file = copied / "run" / "environment.json", copied / "run" / "environment.until_step_6.json"
        go_on(copied, "steps=7")
        assert not kept_file.exists(), "it was the same"
        for name, step in (("step_00000006", 6), ("step_00000003", 3)):
            shutil.rmtree(copied / "run" / "checkpoints" / "step_00000007", ignore_errors=True)
            (copied / "run" / "result.json").unlink()
            file.write_text(json.dumps(json.loads(file.read_text()) | {"world_size": 4}))
            go_on(copied, "steps=7")
            assert {path.name for path in file.parent.glob("environment.*")} == {
                "environment.json", f"environment.until_step_{step}.json"
            }  # fmt: skip
            assert json.loads(file.with_name(f"environment.until_step_{step}.json").read_text())["world_size"] == 4
            assert json.loads(file.read_text())["world_size"] == 1
            shutil.rmtree(copied / "run" / "checkpoints" / name)

    def test_going_back_drops_what_was_kept_of_the_steps_undone(self, copied: Path):
        go_on(copied, "steps=9", "optim.lr=0.01")
        shutil.rmtree(copied / "run" / "checkpoints" / "step_00000009")
        shutil.rmtree(copied / "run" / "checkpoints" / "step_00000006")
        (copied / "run" / "result.json").unlink()
        go_on(copied, "steps=9", "optim.lr=0.02")
        assert kept(copied / "run") == {"config.until_step_3.yaml": 0.003, "config.yaml": 0.02}

    def test_without_a_change_nothing_is_told_or_kept(self, copied: Path):
        shutil.rmtree(copied / "run" / "checkpoints" / "step_00000006")
        (copied / "run" / "result.json").unlink()
        output = go_on(copied, "log.every=2")
        assert "resumed from" in output and "from step" not in output
        assert set(kept(copied / "run")) == {"config.yaml"}

    def test_another_recipe_is_told_by_name_and_the_earlier_one_stays(self, copied: Path):
        output = go_on(copied, "steps=7", "recipe=bf16", "checkpoint.allow_recipe_change=true")
        old, new = load_recipe("blockwise").hash, load_recipe("bf16").hash
        assert f"\nrecipe: blockwise ({old[:12]}) -> bf16 ({new[:12]}) from step 7\n" in output
        assert load_recipe(copied / "run" / "recipe.until_step_6.yaml").hash == old


class TestResumeByPath:
    def test_same_command_goes_on_from_its_own_newest_checkpoint(self, copied: Path):
        source = copied / "run" / "checkpoints" / "step_00000003"
        command = (f"resume={source}", "eval.every=3", "checkpoint.every=3", "checkpoint.keep_last=9", "steps=12")
        for run in ("run", "other"):
            lines = io.StringIO()
            stopped = tiny_train(copied, *command, "time_limit_seconds=1e-6", run=run)
            assert (stopped.finished, stopped.steps) == (False, 4)
            resumed = tiny_train(copied, *command, run=run, console=Console(12, stream=lines))
            assert resumed.finished and resumed.steps == 12
            assert "resumed from" in lines.getvalue() and "at step 4;" in lines.getvalue()
            assert f"this run has gone on from {source}" in lines.getvalue()
            again = io.StringIO()
            assert tiny_train(copied, *command, run=run, console=Console(12, stream=again)) == resumed
            assert "is finished: 12 steps" in again.getvalue()

    def test_same_command_begins_again_there_where_the_run_was_killed_before_its_first_checkpoint(self, copied: Path):
        class Killed(Console):
            def step(self, row, eta_seconds) -> None:
                if row["step"] == 5:
                    raise ZeroDivisionError

        source, lines = copied / "run" / "checkpoints" / "step_00000003", io.StringIO()
        with pytest.raises(ZeroDivisionError):
            tiny_train(copied, f"resume={source}", run="other", console=Killed(enabled=False))
        with pytest.raises(ConfigError, match="belongs to another run"):
            tiny_train(copied, f"resume={copied / 'run'}", run="other")
        assert tiny_train(copied, f"resume={source}", run="other", console=Console(6, stream=lines)).finished
        assert f"resumed from {source} at step 3;" in lines.getvalue()
        kept = f"no checkpoint in {copied / 'other'}: starts at step 3; the earlier metrics.jsonl is kept as metrics-1"
        assert kept in lines.getvalue()

    def test_checkpoint_of_the_folder_is_gone_back_to_when_it_is_first_named_or_settings_differ(self, copied: Path):
        source = copied / "run" / "checkpoints" / "step_00000003"
        for rate in ("1e-3", "2e-3"):
            lines = io.StringIO()
            tiny_train(copied, f"resume={source}", f"optim.lr={rate}", console=Console(6, stream=lines))
            assert "at step 3;" in lines.getvalue() and "has gone on" not in lines.getvalue()

    def test_run_folder_itself_is_auto_and_another_runs_checkpoint_is_refused_with_the_way_out(self, copied: Path):
        lines = io.StringIO()
        run = copied / "run"
        tiny_train(copied, f"resume={run}", "steps=7", "eval.every=3", console=Console(7, stream=lines))
        assert "at step 6;" in lines.getvalue() and "has gone on" not in lines.getvalue()
        shutil.copytree(run, copied / "elsewhere")
        with pytest.raises(ConfigError, match="belongs to another run.*Leave out `resume` to go on"):
            tiny_train(copied, f"resume={copied / 'elsewhere'}", "steps=8")
