from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
import yaml

from fp8train.checkpoint import open_checkpoint, saved_steps
from fp8train.checkpoint.files import FolderWriter
from fp8train.distributed import World
from fp8train.errors import CheckpointError, RecipeError
from fp8train.metrics import read_metrics
from fp8train.nn.weights import named_linears
from fp8train.quant.formats import BF16
from fp8train.recipe import Recipe, load_recipe
from fp8train.trainer.alarm_watcher import AlarmWatcher
from fp8train.trainer.assembly import assemble
from fp8train.trainer.console import Console
from fp8train.trainer.precision_control import PrecisionControl
from fp8train.trainer.step import StepResult
from fp8train.trainer.watcher import RollBack
from tests.tiny_run import tiny_config, tiny_train

DOWN = "layers.0.mlp.down_proj"


def recipe_with(folder: Path, **options: Any) -> Path:
    """The blockwise recipe with a schedule, an alarm and so on."""
    document = load_recipe("blockwise").document | options
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]


def step_result(loss: float = 3.0, updated: bool = True) -> StepResult:
    return StepResult(loss=loss, grad_norm=1.0, valid_tokens=1, updated=updated, stop=False)


@pytest.fixture
def blow_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes the step of that number not finite, once; gives the list of steps that the alarm has seen."""

    def install(number: int) -> list[int]:
        seen: list[int] = []
        honest = AlarmWatcher.after_step

        def after_step(self: AlarmWatcher, step: int, result: StepResult) -> dict[str, Any]:
            bad = step == number and number not in seen
            seen.append(step)
            return honest(self, step, step_result(float("nan"), updated=False) if bad else result)

        monkeypatch.setattr(AlarmWatcher, "after_step", after_step)
        return seen

    return install


class TestSchedule:
    def test_tail_begins_after_its_share_of_the_steps(self, tmp_path: Path):
        recipe = load_recipe(recipe_with(tmp_path, schedule=[{"at": 0.5, "use": "bf16"}]))
        model = assemble(tiny_config(tmp_path), torch.device("cpu"), recipe=recipe).model
        control = PrecisionControl(model, recipe, steps=6)
        assert [control.scheduled(step) for step in range(1, 7)] == [None, None, None, "bf16", "bf16", "bf16"]
        control.apply(4)
        assert all(linear.precision == BF16 for linear in named_linears(model).values())
        control.apply(3)
        assert named_linears(model)[DOWN].precision.any_fp8 and not named_linears(model)["lm_head"].precision.any_fp8

    @pytest.mark.parametrize(("at", "steps", "first"), [(0.55, 100, 56), (0.07, 100, 8), (0.81, 300, 244), (0.5, 3, 3)])
    def test_first_step_is_that_of_the_decimal_number(self, at: float, steps: int, first: int, tmp_path: Path):
        recipe = load_recipe(recipe_with(tmp_path, schedule=[{"at": at, "use": "bf16"}]))
        model = assemble(tiny_config(tmp_path), torch.device("cpu")).model
        control = PrecisionControl(model, recipe, steps)
        assert [control.scheduled(step) for step in (first - 1, first)] == [None, "bf16"]

    def test_head_of_a_scheduled_run_is_that_of_fp8_and_its_tail_is_not(self, tmp_path: Path):
        recipe = recipe_with(tmp_path, schedule=[{"at": 0.5, "use": "bf16"}])
        scheduled = tiny_train(tmp_path, f"recipe={recipe}", run="scheduled")
        tiny_train(tmp_path, run="fp8")
        a, b = losses(tmp_path / "scheduled"), losses(tmp_path / "fp8")
        assert a[:3] == b[:3] and a[3] != b[3]
        linear = scheduled.coverage["linears"][0]
        assert linear["gemms"]["fprop"]["fp8_rows"] == 3 * 512
        assert linear["changed"] == linear["gemms"]["fprop"]["exception"] == "the schedule: bf16 from step 4"
        assert [row["changed"] for row in scheduled.coverage["linears"] if row["fqn"] == "lm_head"] == [None]
        assert scheduled.evals[-1]["eval_loss"] == scheduled.evals[-1]["eval_loss_bf16"]

    def test_schedule_that_changes_no_linear_is_refused(self, tmp_path: Path):
        rules = [{"match": "*", "use": "bf16"}]
        recipe = recipe_with(tmp_path, rules=rules, schedule=[{"at": 0.5, "use": "fp8"}])
        with pytest.raises(RecipeError, match="schedule changes none of the 8 linears.*Give FP8 in a rule"):
            tiny_train(tmp_path, f"recipe={recipe}")
        assert not (tmp_path / "run").exists()

    def test_resumed_run_is_the_uninterrupted_one(self, tmp_path: Path):
        recipe = recipe_with(tmp_path, schedule=[{"at": 0.5, "use": "bf16"}])
        tiny_train(tmp_path, f"recipe={recipe}", "checkpoint.every=4", "checkpoint.keep_last=9", run="whole")
        checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000004"
        tiny_train(tmp_path, f"recipe={recipe}", f"resume={checkpoint}", run="resumed")
        assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[4:]

    def test_schedule_is_part_of_the_hash_so_that_a_checkpoint_refuses_another(self, tmp_path: Path):
        tiny_train(tmp_path, f"recipe={recipe_with(tmp_path, schedule=[{'at': 0.5, 'use': 'bf16'}])}", "steps=2")
        with pytest.raises(CheckpointError, match="was trained under the recipe"):
            tiny_train(tmp_path, f"recipe={recipe_with(tmp_path, schedule=[{'at': 0.6, 'use': 'bf16'}])}", "steps=3")


class DyingAfterRollBack(Console):
    """An end in the first step after an alarm."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self._last = 0

    def step(self, row: Any, eta_seconds: float | None) -> None:
        if row["step"] < self._last:
            raise SystemExit
        self._last = row["step"]


class Recording(Console):
    """Keeps the rows of all steps, of those too that are undone."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(6, print_every=1, stream=stream)
        self.rows: list[Any] = []

    def step(self, row: Any, eta_seconds: float | None) -> None:
        self.rows.append(row)
        super().step(row, eta_seconds)


class TestAlarm:
    def test_demotes_the_worst_goes_back_and_logs_the_event(self, tmp_path: Path, blow_up: Any):
        seen = blow_up(5)
        recipe = recipe_with(tmp_path, alarm={"on": ["nonfinite"]})
        stream = io.StringIO()
        console = Recording(stream)
        result = tiny_train(tmp_path, f"recipe={recipe}", "checkpoint.every=3", console=console)
        assert seen == [1, 2, 3, 4, 5, 4, 5, 6]
        events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events] == [5]
        demoted = events[0]["demoted"]
        assert demoted and events[0]["worst"]["fqn"] in demoted
        rows = {row["fqn"]: row["gemms"]["fprop"] for row in result.coverage["linears"]}
        # 3 steps in FP8, 3 in BF16; the 2 that were undone do not count
        assert rows[demoted[0]] | {"exception": None} == {
            "planned": "fp8", "fp8_calls": 3, "other_calls": 3, "fp8_rows": 3 * 512, "other_rows": 3 * 512,
            "exception": None,
        }  # fmt: skip
        assert rows["lm_head"]["other_calls"] == 6
        changed = {row["fqn"]: row["changed"] for row in result.coverage["linears"]}
        words = "an alarm at step 5 put it in BF16 from step 4: loss or gradient is not finite"
        assert {fqn for fqn, text in changed.items() if text is not None} == set(demoted)
        assert changed[demoted[0]] == rows[demoted[0]]["exception"] == words
        share = r"\d+\.\d% of the linears' FLOPs in FP8 \(coverage.json says which\)"
        ending = rf"finished 6 steps in \S+ s of training, {share}, {len(demoted)} linears demoted to BF16"
        assert re.search(ending, stream.getvalue())
        steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
        assert steps == [*range(1, 7)]
        assert result.train_seconds == pytest.approx(sum(row["step_seconds"] for row in console.rows))  # of all 8

    def test_before_the_first_checkpoint_it_goes_back_to_the_start(self, tmp_path: Path, blow_up: Any):
        seen = blow_up(2)
        tiny_train(tmp_path, f"recipe={recipe_with(tmp_path, alarm={'on': ['nonfinite']})}", "steps=3")
        assert seen == [1, 2, 1, 2, 3]

    @pytest.mark.parametrize(
        ("every", "steps"), [("3", [1, 2, 3, 4, 5, 4, 5, 6]), ("null", [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6])], ids=str
    )
    def test_what_the_clock_writes_does_not_change_where_it_goes_back_to(
        self, every: str, steps: list[int], tmp_path: Path, blow_up: Any
    ):
        """Else the undone steps, and with them every later loss, would depend on how fast they ran."""
        recipe = recipe_with(tmp_path, alarm={"on": ["nonfinite"]})
        for run, minutes in (("with", "1e-9"), ("without", "null")):
            seen = blow_up(5)
            options = (f"checkpoint.every={every}", f"checkpoint.minutes={minutes}", "checkpoint.keep_last=1")
            tiny_train(tmp_path, f"recipe={recipe}", *options, run=run)
            assert seen == steps
        assert losses(tmp_path / "with") == losses(tmp_path / "without")

    def test_what_a_stop_writes_does_not_change_where_it_goes_back_to(self, tmp_path: Path, blow_up: Any):
        recipe = recipe_with(tmp_path, alarm={"on": ["nonfinite"]})
        options = (f"recipe={recipe}", "checkpoint.every=3")
        blow_up(6)
        tiny_train(tmp_path, *options, run="whole")
        tiny_train(tmp_path, *options, "steps=6", "time_limit_seconds=1e-6", run="run")
        for _ in range(4):  # steps 2 to 5
            assert not tiny_train(tmp_path, *options, "time_limit_seconds=1e-6", run="run").finished
        seen = blow_up(6)
        tiny_train(tmp_path, *options, run="run")
        assert seen == [6, 4, 5, 6]
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    def test_events_that_a_resume_undid_are_dropped(self, tmp_path: Path, blow_up: Any):
        recipe = recipe_with(tmp_path, alarm={"on": ["nonfinite"]})
        options = (f"recipe={recipe}", "checkpoint.every=3")
        for _ in range(2):
            blow_up(5)
            with pytest.raises(SystemExit):
                tiny_train(tmp_path, *options, console=DyingAfterRollBack())
            # as a kill before the checkpoint behind the roll-back: the demotion is not in what is left
            for path in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[2:]:
                shutil.rmtree(path)
        blow_up(5)
        tiny_train(tmp_path, *options)
        assert len((tmp_path / "run" / "events.jsonl").read_text().splitlines()) == 1

    def test_end_after_going_back_resumes_from_there_not_from_the_undone_steps(
        self, tmp_path: Path, blow_up: Any, monkeypatch: pytest.MonkeyPatch
    ):
        blow_up(5)
        write, newest = FolderWriter.write_tensors, list[list[int]]()

        def slow(self: FolderWriter, *arguments: Any) -> None:
            time.sleep(0.3 if self.folder.name == ".step_00000000.tmp" else 0)
            write(self, *arguments)

        class Looking(DyingAfterRollBack):
            def step(self, row: Any, eta_seconds: float | None) -> None:
                newest.append(saved_steps(tmp_path / "run")[-1:])  # what a kill would leave
                super().step(row, eta_seconds)

        monkeypatch.setattr(FolderWriter, "write_tensors", slow)
        recipe = recipe_with(tmp_path, alarm={"on": ["nonfinite"]})
        with pytest.raises(SystemExit):
            tiny_train(tmp_path, f"recipe={recipe}", "checkpoint.minutes=1e-9", console=Looking())
        assert newest[-1] == [open_checkpoint(tmp_path / "run").step] == [0]
        tiny_train(tmp_path, f"recipe={recipe}")
        assert len(losses(tmp_path / "run")) == 6

    def test_alarm_at_the_audited_step_is_no_gemm_that_did_not_run(self, tmp_path: Path, blow_up: Any):
        seen = blow_up(1)
        recipe = recipe_with(tmp_path, alarm={"on": ["nonfinite"]})
        assert tiny_train(tmp_path, f"recipe={recipe}", "strict=true", "steps=2").finished
        assert seen == [1, 1, 2]

    def test_demotion_survives_a_resume(self, tmp_path: Path, blow_up: Any):
        blow_up(2)
        recipe = recipe_with(tmp_path, alarm={"on": ["nonfinite"]})
        tiny_train(tmp_path, f"recipe={recipe}", "checkpoint.every=3", "checkpoint.keep_last=9", run="whole")
        checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000003"
        tiny_train(tmp_path, f"recipe={recipe}", f"resume={checkpoint}", run="resumed")
        assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[3:]
        assert open_checkpoint(checkpoint).state.progress["watchers"]["alarm"]["demotions"] == 1


class TestCauses:
    @pytest.fixture
    def watcher(self, tmp_path: Path) -> AlarmWatcher:
        alarm = {"on": ["spike"], "spike_nats": 0.5, "window": 3, "at_most": 1}
        recipe = load_recipe(load_recipe("blockwise").document | {"alarm": alarm})
        return self.build(recipe, tmp_path)

    @staticmethod
    def build(recipe: Recipe, folder: Path) -> AlarmWatcher:
        config = tiny_config(folder)
        assembly = assemble(config, torch.device("cpu"), recipe=recipe)
        assert recipe.alarm is not None
        control = PrecisionControl(assembly.model, recipe, config.steps)
        watcher = AlarmWatcher(recipe.alarm, control, assembly, World(), folder, lambda text: None)
        from fp8train.data import Batcher, build_dataset

        dataset = build_dataset(config.data, config.seq_len, config.seed)
        watcher.before_step(1, Batcher(dataset, 2, 2).micro_batches(0))
        return watcher

    def test_rise_is_measured_against_the_mean_of_the_window(self, watcher: AlarmWatcher):
        for step, loss in enumerate([3.0, 3.1, 2.9, 3.49], start=1):
            assert watcher.after_step(step, step_result(loss)) == {}
        with pytest.raises(RollBack, match="above the mean of 3 steps"):
            watcher.after_step(5, step_result(3.7))  # the mean of 3.1, 2.9, 3.49 is 3.163

    def test_non_finite_step_is_left_alone_where_only_rises_count(self, watcher: AlarmWatcher):
        assert watcher.after_step(1, step_result(float("nan"), updated=False)) == {}

    def test_losses_count_on_where_nothing_more_can_be_demoted(self, watcher: AlarmWatcher):
        watcher._demotions, watcher._losses = watcher._alarm.at_most, [3.0] * watcher._alarm.window
        for step in range(watcher._alarm.window):
            watcher.after_step(step, step_result(loss=9.0))
        assert watcher._losses == [9.0] * watcher._alarm.window
        assert watcher.after_step(99, step_result(loss=9.0)) == {}
        assert "11 above the mean of 3 steps; at_most" in watcher.after_step(100, step_result(loss=20.0))["alarm"]

    def test_at_most_so_many_demotions(self, watcher: AlarmWatcher):
        losses = [3.0, 3.0, 3.0, 9.0]
        with pytest.raises(RollBack):
            for step, loss in enumerate(losses, start=1):
                watcher.after_step(step, step_result(loss))
        rows = [watcher.after_step(step, step_result(loss)) for step, loss in enumerate(losses, start=1)]
        assert "used up" in rows[-1]["alarm"]

    def test_state_names_why_and_one_of_before_that_does_not_is_read(self, tmp_path: Path):
        watcher = self.build(load_recipe(load_recipe("blockwise").document | {"alarm": {"on": ["spike"]}}), tmp_path)
        watcher.load_state({"demoted": [DOWN], "demotions": 1})
        assert watcher._control.precision(DOWN, 1) == BF16
        assert watcher._control.change(DOWN, 1) == "an alarm put it in BF16"
        watcher.load_state(watcher.state() | {"demoted": {DOWN: "an alarm put it in BF16 after step 7: it rose"}})
        assert watcher._control.change(DOWN, 1) == "an alarm put it in BF16 after step 7: it rose"

    def test_planted_outlier_is_the_worst_and_its_group_goes_with_it(self, tmp_path: Path):
        recipe = load_recipe(load_recipe("blockwise").document | {"alarm": {"on": ["nonfinite"]}})
        watcher = self.build(recipe, tmp_path)
        linears = watcher._control.linears
        with torch.no_grad():  # one input channel of q's weight tile drowns all others of the tile
            linears["layers.0.self_attn.q_proj"].weight[0, 0] = 1e6
        with pytest.raises(RollBack):
            watcher.after_step(1, step_result(float("nan"), updated=False))
        assert list(watcher._control.demoted) == [f"layers.0.self_attn.{name}_proj" for name in "qkv"]
