"""The command compare, which trains its arms: what is trained, what is refused, what is printed and written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp8train.compare import main, train_and_compare, wandb_row
from fp8train.comparison.arms import plan_arms
from fp8train.comparison.crossing import crossed_losses
from fp8train.config import RunConfig, config_to_dict
from fp8train.distributed import World
from fp8train.errors import ConfigError, DataError, DivergedError, TrainingError, exit_code
from fp8train.metrics import read_metrics
from fp8train.trainer.run_folder import RunResult
from tests.run_folders import write_diverged_run, write_run
from tests.tiny_comparison import TINY, configuration


class FakeTrainer:
    """Writes the run folder of a finished run instead of training; stops before run number `stop_at`; the runs of
    `diverging` labels diverge at step 17.
    """

    def __init__(self, *, stop_at: int | None = None, diverging: Sequence[str] = (), **facts: Any) -> None:
        self.trained: list[str] = []
        self.diverging = diverging
        self.stop_at = stop_at
        self.facts = facts

    def __call__(self, config: RunConfig, label: str) -> RunResult:
        folder = Path(str(config.run_dir))
        self.trained.append(f"{label}: {folder.parent.name}/{folder.name}")
        finished = len(self.trained) != self.stop_at
        if not folder.exists():
            facts = {"init_hash": f"seed {config.seed}"} | (self.facts if config.recipe != "bf16" else {})
            write = write_diverged_run if label in self.diverging else write_run
            write(folder, recipe=config.recipe, seed=config.seed, **facts)
            (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
        if label in self.diverging:
            raise DivergedError("train: loss was not finite in 10 steps in a row", 17, "loss is nan")
        content = json.loads((folder / "result.json").read_text()) | {"finished": finished}
        known = {field.name: content.get(field.name) for field in dataclasses.fields(RunResult)}
        return RunResult(**known)


def compare(config: RunConfig, trainer: FakeTrainer) -> int:
    return train_and_compare(config, plan_arms(config), World(), trainer)


def text_file(folder: Path) -> Path:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(f"document {n}: " + "to be or not to be, " * (n % 7 + 5) for n in range(300)))
    return corpus


def tiny_arguments(folder: Path, out: str) -> list[str]:
    data = ["data=text", f"data.path={text_file(folder)}", "steps=4", "log.skip_steps=2", "optim.warmup_steps=1"]
    return [*TINY, *data, f"run_dir={folder / out}"]


def test_comparison_writes_verdict_and_report_and_ends_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    trainer = FakeTrainer(eval_loss=2.2527, tokens_per_second=30_000.0)
    assert compare(configuration(out), trainer) == 0
    assert trainer.trained == ["bf16: bf16/seed_1", "blockwise: blockwise/seed_1"]
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["status"] == "indicative" and verdict["seeds"] == [1]
    assert verdict["comparisons"]["blockwise"]["seeds"][0]["heldout_gap"]["nats"] == pytest.approx(0.0027)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {out / 'report.html'}"
    assert Path(lines[-1].removeprefix("report: ")).read_text().startswith("<!DOCTYPE html>")


def test_summary_names_losses_gemms_reasons_time_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"eval_loss": 2.2527, "tokens_per_second": 30_000.0, "memory_bytes": 1.05e9}
    compare(configuration(tmp_path / "out"), FakeTrainer(**facts))
    text = capsys.readouterr().out
    for wanted in (
        r"BF16\s+FP8 blockwise",
        r"held-out loss, nats/token\s+2.2500\s+2.2527",
        r"gap\s+\+0.0027 \(\+0.12 %\)",
        r"relative loss error, max\s+0.00 % at step 1",
        r"FLOPs of linears in FP8\s+0.0 %\s+95.8 %",
        r"tokens per second\s+[\d,]+\s+[\d,]+ \(0.7\dx\)",
        r"training time\s+4.1 s\s+5.5 s",
        r"peak memory\s+1.30 GiB\s+1001 MiB \(0.75x\)",
        r"FP8 blockwise: in FP8 ran fprop 97.8 %, dgrad 97.8 %, wgrad 91.8 %",
        r"not in FP8: lm_head, fprop, dgrad, wgrad: kept in high precision by the model",
        r"not in FP8: layers.3.mlp.down_proj, wgrad: BF16 weight gradient",
        r"^Indicative: FP8 blockwise ended 0.12 % above BF16, in one seed.$",
        r"^- With one seed",
        rf"run folder: {tmp_path / 'out'}",
    ):
        assert any(re.search(wanted, line) for line in text.splitlines()), wanted


def test_stopped_comparison_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert compare(configuration(out), FakeTrainer(stop_at=2)) == 0
    assert not (out / "verdict.json").exists() and "1 of 2 runs are finished" in capsys.readouterr().out
    shutil.rmtree(out / "arms" / "blockwise")  # the fake leaves a folder that looks finished
    again = FakeTrainer()
    assert compare(configuration(out, "log.print_every=5"), again) == 0
    assert again.trained == ["blockwise: blockwise/seed_1"], "a finished run is not begun again"
    assert (out / "verdict.json").exists()


def test_report_of_another_recipe_in_the_same_folder_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    compare(configuration(out), FakeTrainer())
    first = {name: (out / name).read_bytes() for name in ("report.html", "verdict.json")}
    assert "earlier comparison" not in capsys.readouterr().out
    compare(configuration(out, "recipe=rowwise"), FakeTrainer())
    kept = out / "report-blockwise.html"
    line = f"earlier comparison: kept as {kept}, since this one is not of all its runs"
    assert line in capsys.readouterr().out.splitlines()
    assert kept.read_bytes() == first["report.html"]
    assert (out / "verdict-blockwise.json").read_bytes() == first["verdict.json"]
    assert "FP8 rowwise" in (out / "report.html").read_text()

    compare(configuration(out, "compare.arms=[bf16,blockwise,rowwise]", "recipe=rowwise"), FakeTrainer())
    assert "earlier comparison" not in capsys.readouterr().out, "it has all the runs of the one before"
    assert sorted(path.name for path in out.glob("report*")) == ["report-blockwise.html", "report.html"]


def test_kept_report_of_more_seeds_is_not_replaced_by_one_of_fewer(tmp_path: Path) -> None:
    two, one, other = (["compare.seeds=2", "compare.arms=[bf16,blockwise]"], [], ["recipe=rowwise"])
    for options in (two, other, one, other):
        compare(configuration(tmp_path, *options), FakeTrainer())
    seeds = {path.name: json.loads(path.read_text())["seeds"] for path in tmp_path.glob("verdict-*.json")}
    assert seeds == {"verdict-blockwise.json": [1, 2], "verdict-rowwise.json": [1], "verdict-blockwise-2.json": [1]}


def test_begun_arms_of_another_configuration_are_not_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(configuration(out), FakeTrainer(stop_at=2))
    with pytest.raises(ConfigError, match=r"bf16/seed_1 was begun with optim.lr=.*, this comparison has optim.lr=0.5"):
        compare(configuration(out, "optim.lr=0.5"), FakeTrainer())


def test_a_damaged_verdict_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "verdict-rowwise.json").write_text('{"arms": [')

    def train(config: RunConfig, label: str) -> RunResult:
        raise AssertionError("it trained")

    with pytest.raises(DataError, match=r"verdict-rowwise.json"):
        compare(configuration(tmp_path), train)


@pytest.mark.parametrize(
    ("fact", "words"), [("init_hash", "initial weights"), ("stream_hash", "token stream")], ids=["init", "stream"]
)
def test_arms_with_another_start_are_refused(tmp_path: Path, fact: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words} of .*blockwise/seed_1 .* are not those of .*bf16/seed_1"):
        compare(configuration(tmp_path / "out"), FakeTrainer(**{fact: "other"}))
    assert not (tmp_path / "out" / "verdict.json").exists()


def test_time_limit_is_of_the_whole_comparison(tmp_path: Path) -> None:
    limits = []

    def train(config: RunConfig, label: str) -> RunResult:
        limits.append(config.time_limit_seconds)
        return FakeTrainer()(config, label)

    config = configuration(tmp_path / "out", "time_limit_seconds=100")
    train_and_compare(config, plan_arms(config), World(), train)
    assert 0 < limits[1] < limits[0] <= 100


def test_wandb_gets_the_numbers_of_the_verdict(tmp_path: Path) -> None:
    compare(configuration(tmp_path), FakeTrainer(eval_loss=2.2527))
    row = wandb_row(json.loads((tmp_path / "verdict.json").read_text()))
    assert row["step"] == 40 and row["compare/status"] == "indicative"
    assert row["compare/blockwise/heldout_gap.nats"] == pytest.approx(0.0027)
    assert row["compare/blockwise/relative_loss_error.ema_max_percent"] == 0.0
    assert row["compare/sentence"].startswith("FP8 blockwise ended") and "one seed" in row["compare/reason"]
    assert (
        row["compare/numbers"].startswith("+0.12 % held-out loss (2.2527 against")
        and "With one" in row["compare/caveats"]
    )
    assert row["compare/blockwise/test.status"] == "indicative" and row["compare/blockwise/test.mean"] > 0
    assert row["compare/blockwise/speed.raw.mean"] > 0 and row["compare/blockwise/speed.time_to_loss.mean"] > 0


def test_real_arms_share_weights_and_tokens_and_a_second_call_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = tiny_arguments(tmp_path, "out")
    assert main(arguments) == 0
    verdict = json.loads((out / "verdict.json").read_text())
    bf16, fp8 = (verdict["arms"][arm]["runs"][0] for arm in ("bf16", "blockwise"))
    assert bf16["fp8_flops_share"] == 0 and fp8["fp8_flops_share"] > 0.5
    assert bf16["train_loss"] != fp8["train_loss"], "the arms differ in their arithmetic"
    for arm, run in (("bf16", bf16), ("blockwise", fp8)):  # of the same steps in report and result.json
        result = json.loads((out / "arms" / arm / "seed_1" / "result.json").read_text())
        assert run["tokens_per_second"] == pytest.approx(result["tokens_per_second"])
    first = [
        next(row["loss"] for row in read_metrics(out / "arms" / arm / "seed_1" / "metrics.jsonl") if "loss" in row)
        for arm in verdict["arms"]
    ]
    assert first[0] == pytest.approx(
        first[1], rel=0.02
    )  # same weights and tokens; E4M3 GEMMs are good to a few percent
    before = {path: path.read_bytes() for path in out.rglob("metrics.jsonl")}
    capsys.readouterr()
    assert main(arguments) == 0
    assert {path: path.read_bytes() for path in out.rglob("metrics.jsonl")} == before
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'report.html'}"
    text = Path(next(a.partition("=")[2] for a in arguments if a.startswith("data.path=")))
    text.write_text(text.read_text() + "more of it\n" * 200)
    with pytest.raises(ConfigError, match="text, tokenizer or split of .*bf16/seed_1 .* are not those of now"):
        main([*arguments, "recipe=rowwise"])
    assert not (out / "arms" / "rowwise").exists(), "nothing was trained on it"


def test_several_seeds_get_a_placebo_a_test_and_a_table_of_gaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(configuration(tmp_path, "compare.seeds=3"), FakeTrainer(eval_loss=2.26)) == 0
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert list(verdict["arms"]) == ["bf16", "placebo", "blockwise"] and verdict["placebo"] == "placebo"
    assert verdict["seeds"] == [1, 2, 3] and len(verdict["comparisons"]["blockwise"]["seeds"]) == 3
    assert [facts["init_hash"] for facts in verdict["shared"]] == ["seed 1", "seed 2", "seed 3"]
    assert verdict["primary"] == "blockwise" and verdict["status"] == "inferior"
    text = capsys.readouterr().out
    assert text.count("held-out loss, nats/token") == 1 and "mean of 3 seeds" in text
    assert re.search(r"FP8 blockwise +\+0.44 % +\+0.44 % +\+0.44 % +\+0.44 % +\+0.44 to \+0.44 % +inferior", text)


TWO_ARMS = ("compare.seeds=3", "compare.arms=[bf16,blockwise]")


def test_run_that_diverges_is_part_of_the_verdict_and_the_others_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = FakeTrainer(diverging=["blockwise seed 1", "blockwise seed 3"])
    assert compare(configuration(tmp_path, *TWO_ARMS), trainer) == 0
    assert len(trainer.trained) == 6
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["status"] == "diverged" and (tmp_path / "report.html").exists()
    text = capsys.readouterr().out
    assert "blockwise seed 1: diverged at step 17 (loss is nan); the comparison goes on without it" in text
    assert "FP8 blockwise: seed 1 diverged at step 17 (loss is nan); seed 3 diverged at step 17" in text


def test_run_that_diverged_is_trained_again_only_without_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(configuration(tmp_path, *TWO_ARMS), FakeTrainer(diverging=["blockwise seed 2"]))
    folder = tmp_path / "arms" / "blockwise" / "seed_2"
    capsys.readouterr()
    again = FakeTrainer()
    assert compare(configuration(tmp_path, *TWO_ARMS), again) == 0 and again.trained == []
    line = "blockwise seed 2: diverged at step 17 (loss is nan) and would again; not trained. "
    line += f"To try it again, delete {folder}"
    assert line in capsys.readouterr().out.splitlines()
    shutil.rmtree(folder)
    assert compare(configuration(tmp_path, *TWO_ARMS), again) == 0
    assert again.trained == ["blockwise seed 2: blockwise/seed_2"]
    assert json.loads((tmp_path / "verdict.json").read_text())["status"] == "equivalent"


def test_baseline_that_diverges_in_every_seed_ends_with_status_1(tmp_path: Path) -> None:
    trainer = FakeTrainer(diverging=[f"bf16 seed {seed}" for seed in (1, 2, 3)])
    assert compare(configuration(tmp_path, *TWO_ARMS), trainer) == 1
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert len(trainer.trained) == 6 and verdict["status"] == "inconclusive"


def test_training_that_fails_otherwise_ends_the_comparison(tmp_path: Path) -> None:
    def train(config: RunConfig, label: str) -> RunResult:
        raise TrainingError("metrics.jsonl: the row of step 2 cannot be written")

    config = configuration(tmp_path)
    with pytest.raises(TrainingError, match="cannot be written"):
        train_and_compare(config, plan_arms(config), World(), train)
    assert not (tmp_path / "verdict.json").exists()


@pytest.mark.parametrize("parallel", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["in turn", "parallel"])
def test_real_runs_that_diverge_end_in_a_verdict_and_are_not_trained_again(
    tmp_path: Path, parallel: int, capfd: pytest.CaptureFixture[str]
) -> None:
    wild = ["steps=30", "optim.lr=1e38", "optim.max_nonfinite_steps=2", f"compare.parallel={parallel}"]
    arguments = [*tiny_arguments(tmp_path, "out"), *wild]
    assert main(arguments) == 1
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert [entry["runs"][0]["diverged"]["step"] for entry in verdict["arms"].values()] == [2, 2]
    assert verdict["status"] == "inconclusive" and verdict["sentence"].endswith("BF16 in 1.")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert main(arguments) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == before
    assert capfd.readouterr().out.count("and would again; not trained") == 2


def test_margin_of_the_user_decides(tmp_path: Path) -> None:
    for margin, status in ((0.4, "inferior"), (0.5, "equivalent")):
        out = tmp_path / str(margin)
        compare(configuration(out, "compare.seeds=2", f"compare.margin_percent={margin}"), FakeTrainer(eval_loss=2.26))
        verdict = json.loads((out / "verdict.json").read_text())
        assert (verdict["status"], verdict["margin_percent"]) == (status, margin)


@pytest.mark.slow
def test_runs_in_parallel_processes_stopped_and_resumed_are_those_of_one_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_arguments(tmp_path, "one")) == 0
    parallel = [*tiny_arguments(tmp_path, "many"), "compare.parallel=2"]
    assert main([*parallel, "time_limit_seconds=0.01"]) == 0  # both save after a step
    assert not (tmp_path / "many" / "verdict.json").exists()
    assert "0 of 2 runs are finished; the same command goes on" in capfd.readouterr().out
    assert main(parallel) == 0
    verdicts = [json.loads((tmp_path / name / "verdict.json").read_text()) for name in ("one", "many")]
    places = [json.loads(next((tmp_path / name).rglob("environment.json")).read_text()) for name in ("one", "many")]
    assert [place["runs_on_device"] for place in places] == [1, 2] and verdicts[1]["parallel"] == 2
    for arm in ("bf16", "blockwise"):
        losses = [[run["train_loss"] for run in verdict["arms"][arm]["runs"]] for verdict in verdicts]
        assert losses[0] == losses[1]
    output = capfd.readouterr().out
    assert "[blockwise] step 4/4" in output and "[bf16] resumed from" in output

    crossed = verdicts[0]["comparisons"]["blockwise"]["seeds"][0]["crossed"]
    assert all(isinstance(value, float) for value in crossed.values())
    assert len({crossed[key] for key in ("baseline_in_baseline", "baseline_in_arm", "arm_in_baseline")}) == 3
    own = crossed_losses(
        tmp_path / "one/arms/blockwise/seed_1", {"own": tmp_path / "one/arms/blockwise/seed_1"}, World()
    )
    assert own["own"] == crossed["arm_in_arm"], "the same windows and arithmetic as in the run's own evaluation"


@pytest.mark.slow
def test_run_that_fails_in_a_process_of_its_own_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tiny_arguments(tmp_path, "out")
    (tmp_path / "corpus.txt").write_text("")
    assert exit_code(main, [*broken, "compare.parallel=2"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fp8train: error: ")
