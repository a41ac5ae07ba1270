"""Reading a run folder back: what is damaged is named by file and line, what is there is read exactly."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fp8train.errors import DataError
from fp8train.report.run_record import read_metrics, read_run
from tests.run_folders import ENVIRONMENT, verdict_of, words_of, write_run

ROW = '{"step": 1, "loss": 2.5}'
LINEAR = '{"linears": [{"fqn": "q", "shape": %s, "gemms": {"fprop": {"other_rows": 1}}}]}'


@pytest.mark.parametrize(
    ("recorded", "emulates"),
    [
        pytest.param({"backend": "hopper:bits=14,promote=128", "emulates": True}, True, id="hopper"),
        pytest.param({"backend": "triton", "emulates": False}, False, id="a GPU's kernels"),
        pytest.param({"backend": "of another version", "emulates": True}, True, id="unknown, recorded"),
        pytest.param({"backend": "hopper:bits=14,promote=128"}, True, id="hopper, not recorded"),
        pytest.param({"backend": "triton"}, False, id="a GPU's kernels, not recorded"),
        pytest.param({"backend": "of another version"}, False, id="unknown, not recorded"),
        pytest.param({}, False, id="no coverage"),
    ],
)
def test_run_says_whether_its_backend_emulates(tmp_path: Path, recorded: dict[str, object], emulates: bool) -> None:
    run = write_run(tmp_path / "run", coverage=recorded)
    assert read_run(run).emulates is emulates


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "loss":', '{"step": 2, "loss": NaN}', "[1, 2]", '{"loss": 2.5}', '{"step": 2, "loss": "low"}', "",
        '{"step": 1%s, "loss": 2.5}' % ("0" * 20), '{"step": 2, "loss": 1%s}' % ("0" * 400), "[" * 100_000,
        '{"step": 2, "loss": 2.5, "fp8/columns": ["amax"], "fp8/lm_head/x": [1, 2]}',
        '{"step": 2, "loss": 2.5, "fp8/what_if": null}',
    ],
    ids=[
        "cut", "nan", "no object", "no step", "text for a number", "empty",
        "step beyond 64 bits", "loss beyond every float", "deep",
        "telemetry of other columns", "telemetry of nothing",
    ],
)  # fmt: skip
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{ROW}\n{line}\n{ROW}\n")
    with pytest.raises(DataError, match=rf"{path}:2: damaged line"):
        read_metrics(path)


def test_bytes_that_are_not_utf8_are_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROW.encode() + b'\n{"step": 2, "loss": 2.0, "note": "\xff"}\n')
    with pytest.raises(DataError, match=":2: damaged line"):
        read_metrics(path)


def test_step_logged_twice_counts_once_as_logged_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 2, "loss": 2.4}\n')
    train = read_metrics(path).train
    assert train.steps.tolist() == [1, 2]
    assert train.columns["loss"].tolist() == [3.0, 2.4]


def test_null_is_not_a_number_and_last_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": null, "nonfinite": true}\n')
    metrics = read_metrics(path)
    train, evals = metrics.train, metrics.evals
    assert math.isnan(train.columns["loss"][1]) and train.last("loss") is None
    assert len(evals) == 0 and evals.last("eval_loss") is None


def test_training_and_evaluation_rows_are_told_apart(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", losses=np.full(10, 2.0), eval_loss=1.5))
    assert len(run.train) == 10
    assert run.evals.steps.tolist() == [5, 10]
    assert run.evals.last("eval_loss") == 1.5
    assert run.result["finished"] and run.config["recipe"] == "bf16" and run.coverage["linears"] and run.recipe


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl does not exist"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "has no training step"),
        (lambda run: (run / "coverage.json").write_text('{"linears"'), "coverage.json: cannot be read"),
        (lambda run: (run / "config.yaml").write_text("- 1"), "config.yaml: holds a list"),
        (lambda run: (run / "config.yaml").write_text("seed: one"), "config.yaml: seed is 'one'; needs a number"),
        (lambda run: (run / "recipe.yaml").write_bytes(b"\xff"), "recipe.yaml: cannot be read"),
        (lambda run: (run / "result.json").write_text('{"steps": "40"}'), "steps is '40'; needs a number"),
        (lambda run: (run / "result.json").write_text('{"diverged": true}'), "diverged is 'True'; needs a dict"),
        (lambda run: (run / "result.json").write_text('{"diverged": {"step": 3}}'), "diverged.reason is 'None'"),
        (lambda run: (run / "result.json").write_text('{"memory_bytes": {"codes": []}}'), "memory_bytes.codes is "),
        (lambda run: (run / "config.yaml").write_text("log: {skip_steps: few}"), "log.skip_steps is 'few'"),
        (lambda run: (run / "recipe.yaml").write_text("rules: [{match: x}]"), r"recipe.yaml: rules\[0\].use is 'None'"),
        (lambda run: (run / "coverage.json").write_text('{"linears": null}'), "linears is 'None'; needs a list"),
        (lambda run: (run / "coverage.json").write_text(LINEAR % "[]"), r"linears\[0\].shape is .* list of at least 2"),
        (lambda run: (run / "coverage.json").write_text(LINEAR % "[8, 8]"), "gemms.fprop.fp8_rows is 'None'"),
        (lambda run: (run / "environment.json").write_text('{"torch": NaN}'), "NaN is not JSON"),
        (lambda run: (run / "environment.json").write_text("[" * 100_000), "environment.json: cannot be read"),
    ],
    ids=[
        "no metrics", "empty metrics", "damaged coverage", "foreign config", "seed", "recipe", "steps", "diverged",
        "diverged for no reason", "memory", "skip_steps", "rule", "no linears", "shape", "rows", "nan", "deep",
    ],
)  # fmt: skip
def test_damaged_folder_is_refused(tmp_path: Path, spoil: object, message: str) -> None:
    run = write_run(tmp_path / "run")
    spoil(run)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        read_run(run)


def test_facts_of_another_kind_are_other_facts(tmp_path: Path) -> None:
    """What a run only tells is told, of whatever kind it is."""
    place = ENVIRONMENT | {"torch": ["2.13.0"]}
    runs = {recipe: read_run(write_run(tmp_path / recipe, recipe=recipe)) for recipe in ("bf16", "blockwise")}
    runs["blockwise"].environment = place
    verdict = verdict_of({arm: {1: run} for arm, run in runs.items()})
    assert "torch BF16 2.13.0, FP8 blockwise ['2.13.0']" in words_of(verdict)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_run(tmp_path / "nothing")


def test_damaged_lines_are_skipped_and_noted_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{ROW}\n{{"step": 2, "lo\n{{"step": 3, "loss": "low"}}\n{{"step": 4, "loss": 2.0}}\n')
    metrics = read_metrics(path, skip_damaged=True)
    assert metrics.train.steps.tolist() == [1, 4]
    assert [line.split(": ")[0] for line in metrics.damaged] == [f"{path}:2", f"{path}:3"]


def test_telemetry_rows_are_kept_with_their_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0, "fp8/columns": ["amax"], "fp8/q/x": [1.5]}\n{"step": 2, "loss": 2.0}\n')
    assert read_metrics(path).telemetry == [{"step": 1, "fp8/columns": ["amax"], "fp8/q/x": [1.5]}]


@pytest.mark.parametrize(("recipe", "noise"), [("bf16", 0.0), ("placebo", 0.0265)])
def test_noise_of_a_recipe_tells_a_placebo(tmp_path: Path, recipe: str, noise: float) -> None:
    assert read_run(write_run(tmp_path / "run", recipe=recipe)).noise == noise
