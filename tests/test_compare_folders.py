"""The command compare on run folders that are there: how they become arms, which are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fp8train import eval as command
from fp8train.compare import main
from fp8train.errors import ConfigError, DataError, UserError, exit_code
from tests.run_folders import write_diverged_run, write_run


def test_folders_that_are_there_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bf16 = write_run(tmp_path / "a", recipe="bf16")
    fp8 = write_run(tmp_path / "b", recipe="blockwise", eval_loss=2.2727)
    out = tmp_path / "out"
    assert main([f"runs=[{bf16},{fp8}]", f"run_dir={out}"]) == 0
    verdict = json.loads((out / "verdict.json").read_text())
    assert list(verdict["arms"]) == ["bf16", "blockwise"] and verdict["arms"]["blockwise"]["runs"][0]["run_dir"] == str(
        fp8
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'report.html'}"


def test_folder_of_the_verdict_is_named_after_the_arms_unless_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", recipe="bf16")
    write_run(tmp_path / "b", recipe="blockwise")
    assert main(["runs=[a,b]"]) == 0
    written = sorted(path.name for path in (tmp_path / "runs" / "compare-bf16-blockwise").iterdir())
    assert written == ["report.html", "verdict.json"]


def test_names_in_the_files_of_others_do_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / name, recipe=name)) for name in ("bf16", "blockwise")]
    (tmp_path / "blockwise" / "config.yaml").write_text(yaml.safe_dump({"recipe": "x\x1b[2J\x9b"}))
    assert main([f"runs=[{','.join(runs)}]", f"run_dir={tmp_path / 'out'}"]) == 0
    assert r"x\x1b[2J\x9b" in (printed := capsys.readouterr().out) and not {"\x1b", "\x9b"} & set(printed)
    assert exit_code(command.main, [f"checkpoint={tmp_path}/no\x1b[2J"]) == 2
    assert r"no\x1b[2J: is not a folder" in (said := capsys.readouterr().err) and "\x1b" not in said


def test_two_runs_of_one_recipe_are_told_apart(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, recipe="blockwise")) for name in "abc"]
    assert main([f"runs=[{','.join(runs)}]", f"run_dir={tmp_path / 'out'}"]) == 0
    assert list(json.loads((tmp_path / "out" / "verdict.json").read_text())["arms"]) == [
        "blockwise",
        "blockwise_2",
        "blockwise_3",
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stream_hash": "x"}, "data order differs"),
        ({"losses": np.full(50, 2.0)}, "token count differs: bf16 has 163,840, blockwise has 204,800"),
        ({"tokenizer_hash": "x"}, "tokenizer differs"),
        ({"eval_hash": "x"}, "eval set differs"),
        ({"model_hash": "x"}, "model differs"),
    ],
    ids=["data order", "token count", "tokenizer", "eval set", "model"],
)
def test_folders_that_cannot_be_compared_are_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bf16, fp8 = write_run(tmp_path / "a"), write_run(tmp_path / "b", recipe="blockwise", **change)
    assert exit_code(main, [f"runs=[{bf16},{fp8}]", f"run_dir={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert reason in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["runs=[a]", "run_dir=out"], ConfigError, "needs at least two"),
        (["runs=[a,./a]", "run_dir=out"], ConfigError, "names a folder twice"),
        (["runs=[a,b]", "run_dir=out"], DataError, "b is not a folder"),
        (["runs=[a,b]", "run_dir="], ConfigError, "run_dir: got an empty text"),
        (["runs=[a,b]", "run_dir=out", "steps=3"], ConfigError, "steps"),
        (["runs=[a,b]", "run_dir=a"], ConfigError, "is the folder of a run"),
    ],
    ids=["one", "twice", "missing", "empty run_dir", "foreign key", "over a run"],
)
def test_bad_arguments_for_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: type[UserError], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    with pytest.raises(error, match=message):
        main(arguments)
    assert not (tmp_path / "out").exists()


def test_damaged_metrics_are_named_by_file_and_line(tmp_path: Path) -> None:
    bf16, fp8 = write_run(tmp_path / "a"), write_run(tmp_path / "b", recipe="blockwise")
    with (fp8 / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo\n')
    with pytest.raises(DataError, match=r"b/metrics.jsonl:43: damaged line"):
        main([f"runs=[{bf16},{fp8}]", f"run_dir={tmp_path / 'out'}"])


def test_a_last_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    bf16, fp8 = write_run(tmp_path / "a"), write_run(tmp_path / "b", recipe="blockwise")
    with (fp8 / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert main([f"runs=[{bf16},{fp8}]", f"run_dir={tmp_path / 'out'}"]) == 0


def seeds_of_two_arms(folder: Path, seeds: Sequence[int] = (1, 2, 3), **changes: Any) -> dict[str, list[Path]]:
    """Run folders of BF16 and of blockwise, 0.1 % above it in each seed."""
    paths: dict[str, list[Path]] = {"bf16": [], "blockwise": []}
    for seed in seeds:
        for arm in paths:
            options = {"recipe": arm, "seed": seed, "init_hash": f"seed {seed}", "stream_hash": f"stream {seed}"}
            options |= {"eval_loss": (2.25 + 0.01 * seed) * (1.001 if arm == "blockwise" else 1.0)}
            options |= changes if (arm, seed) == ("blockwise", 2) else {}
            paths[arm].append(write_run(folder / arm / f"seed_{seed}", **options))
    return paths


def test_folders_of_several_seeds_are_grouped_into_arms(tmp_path: Path) -> None:
    paths = seeds_of_two_arms(tmp_path / "arms")
    interleaved = [str(path) for pair in zip(*paths.values(), strict=True) for path in pair]
    for name, runs in {"runs": interleaved, "arms": [str(tmp_path / "arms" / arm) for arm in paths]}.items():
        out = tmp_path / name
        assert main([f"runs=[{','.join(runs)}]", f"run_dir={out}"]) == 0
        verdict = json.loads((out / "verdict.json").read_text())
        assert list(verdict["arms"]) == ["bf16", "blockwise"] and verdict["seeds"] == [1, 2, 3]
        assert verdict["status"] == "equivalent" and verdict["comparisons"]["blockwise"]["test"]["mean"] == (
            pytest.approx(0.1)
        )


def test_arms_with_other_seeds_are_refused(tmp_path: Path) -> None:
    paths = seeds_of_two_arms(tmp_path / "arms")
    runs = [*paths["bf16"], *paths["blockwise"][:2]]
    with pytest.raises(ConfigError, match="bf16 has seeds 1, 2, 3, blockwise has 1, 2; needs a run of every arm"):
        main([f"runs=[{','.join(map(str, runs))}]", f"run_dir={tmp_path / 'out'}"])


def test_seed_that_saw_other_data_is_refused(tmp_path: Path) -> None:
    paths = seeds_of_two_arms(tmp_path / "arms", stream_hash="other")
    runs = ",".join(str(path) for runs in paths.values() for path in runs)
    with pytest.raises(ConfigError, match="data order differs"):
        main([f"runs=[{runs}]", f"run_dir={tmp_path / 'out'}"])


def test_damaged_lines_are_left_out_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bf16, fp8 = write_run(tmp_path / "a"), write_run(tmp_path / "b", recipe="blockwise")
    lines = (fp8 / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4][:20]
    (fp8 / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    arguments = [f"runs=[{bf16},{fp8}]", f"run_dir={tmp_path / 'out'}"]
    assert exit_code(main, arguments) == 2
    error = capsys.readouterr().err
    assert "metrics.jsonl:5: damaged line" in error and "compare.skip_damaged=true" in error and error.count("\n") == 1
    assert main([*arguments, "compare.skip_damaged=true"]) == 0
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert verdict["arms"]["blockwise"]["runs"][0]["damaged_lines"] == 1
    assert verdict["comparisons"]["blockwise"]["seeds"][0]["relative_loss_error"]["steps"] == 39
    assert "- FP8 blockwise: damaged lines of metrics left out: 1." in capsys.readouterr().out


def test_report_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", recipe="blockwise")]
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    assert exit_code(main, [f"runs=[{runs[0]},{runs[1]}]", f"run_dir={tmp_path / 'out'}"]) != 0
    error = capsys.readouterr().err
    assert "report.html" in error and error.count("\n") == 1, "one line, no traceback"


def test_folder_of_a_run_that_diverged_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bf16 = write_run(tmp_path / "a")
    fp8 = write_diverged_run(tmp_path / "b", recipe="blockwise")
    assert main([f"runs=[{bf16},{fp8}]", f"run_dir={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "verdict.json").read_text())["status"] == "diverged"
    text = capsys.readouterr().out
    assert "\nDiverged: FP8 blockwise diverged in 1 of 1 seed, BF16 in none.\n" in text
    assert "- FP8 blockwise: seed 1 diverged at step 17 (loss is nan).\n" in text
    assert main([f"runs=[{fp8},{bf16}]", f"run_dir={tmp_path / 'turned'}"]) == 1


def test_folder_of_a_run_that_diverged_from_other_weights_is_refused(tmp_path: Path) -> None:
    bf16 = write_run(tmp_path / "a")
    fp8 = write_diverged_run(tmp_path / "b", recipe="blockwise", init_hash="other")
    with pytest.raises(ConfigError, match="initial weights differs"):
        main([f"runs=[{bf16},{fp8}]", f"run_dir={tmp_path / 'out'}"])


def comparison(folder: Path) -> Path:
    """A comparison folder of two arms and a placebo, with verdict, report and crossed losses."""
    for seed in (1, 2):
        for arm in ("bf16", "placebo", "blockwise"):
            options = {"recipe": arm, "seed": seed, "init_hash": f"seed {seed}", "stream_hash": f"stream {seed}"}
            write_run(folder / "arms" / arm / f"seed_{seed}", **options)
    crossed = {f"blockwise seed {seed}": {"step": 40, "baseline_weights": 2.5 + seed} for seed in (1, 2)}
    (folder / "crossed.json").write_text(json.dumps(crossed))
    assert main([f"runs={folder}", "margin_percent=0.5"]) == 0
    return folder


def test_report_of_a_comparison_is_written_again_with_all_that_it_knows(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    first = json.loads((folder / "verdict.json").read_text())
    assert list(first["arms"]) == ["bf16", "blockwise", "placebo"] and first["seeds"] == [1, 2]
    assert [pair["crossed"]["baseline_in_arm"] for pair in first["comparisons"]["blockwise"]["seeds"]] == [3.5, 4.5]
    for again in ([f"runs={folder}"], [f"runs=[{folder}/arms/bf16,{folder}/arms/blockwise,{folder}/arms/placebo]"]):
        assert main([*again, f"run_dir={folder}"]) == 0
        assert json.loads((folder / "verdict.json").read_text()) == first, "margin and crossed losses included"
    assert sorted(path.name for path in folder.iterdir()) == ["arms", "crossed.json", "report.html", "verdict.json"]


def test_margin_of_any_size_is_taken_up_again(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    for margin in (["margin_percent=1e9"], []):
        assert main([f"runs={folder}", *margin]) == 0
        assert json.loads((folder / "verdict.json").read_text())["margin_percent"] == 1e9


def test_a_comparison_that_was_moved_is_the_same_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comparison(tmp_path / "c").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main([f"runs={folder}"]) == 0
    assert "kept as" not in capsys.readouterr().out
    assert not list(folder.glob("report-*.html"))


def test_a_comparison_with_an_unfinished_arm_is_refused(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    shutil.rmtree(folder / "arms" / "blockwise" / "seed_2")
    with pytest.raises(DataError, match="seed_2 is not a folder"):
        main([f"runs={folder}"])
    (folder / "verdict.json").unlink()
    with pytest.raises(ConfigError, match="bf16 has seeds 1, 2, blockwise has 1"):
        main([f"runs={folder}"])


def test_other_things_among_the_runs_of_a_comparison_are_no_runs(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    shutil.copytree(folder / "arms" / "bf16" / "seed_1", folder / "arms" / "bf16" / "seed_1.bak")
    (folder / "arms" / "foo").mkdir()
    (folder / "arms" / "bf16" / "seed_notes.txt").touch()
    write_run(folder / "arms" / "rowwise" / "seed_1", recipe="rowwise", init_hash="seed 1", stream_hash="stream 1")
    first = json.loads((folder / "verdict.json").read_text())
    assert main([f"runs={folder}"]) == 0
    assert json.loads((folder / "verdict.json").read_text()) == first, "the arms that it was of"
    (folder / "verdict.json").unlink()
    shutil.rmtree(folder / "arms" / "rowwise")
    assert main([f"runs={folder}"]) == 0
    assert list(json.loads((folder / "verdict.json").read_text())["arms"]) == ["bf16", "blockwise", "placebo"]


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": {"bf16": {"runs": []}, "x/../../outside": {"runs": [{"seed": 1, "run_dir": "/elsewhere"}]}}},
        {"arms": {"bf16": {"runs": [{"seed": "../../x", "run_dir": "a"}]}}},
        {"margin_percent": "0.25"},
        {"alpha": None},
        {"looks": [{"seeds": 1, "steps": 40, "margin_percent": 0.25}]},
    ],
    ids=["arm outside", "seed outside", "text", "null", "look without its level"],
)
def test_a_verdict_that_is_none_is_refused_and_moves_no_file(changes: dict[str, Any], tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, recipe=name)) for name in ("bf16", "blockwise")]
    out = tmp_path / "out"
    given = [f"runs=[{','.join(runs)}]", f"run_dir={out}"]
    main(given)
    for part in ("report-x", "verdict-x"):  # or there would be no way through them to what lies outside
        (out / part).mkdir()
    verdict = json.loads((out / "verdict.json").read_text()) | changes
    (out / "verdict.json").write_text(json.dumps(verdict))
    with pytest.raises(DataError, match=r"verdict.json: is not as fp8train writes it; needs .* Delete it\."):
        main(given)
    assert json.loads((out / "verdict.json").read_text()) == verdict and not (tmp_path / "outside.json").exists()


@pytest.mark.parametrize("argument", ["margin_percent=0", "looks=0"])
def test_zero_is_refused_and_not_taken_for_nothing(argument: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=argument.partition("=")[0]):
        main([f"runs={comparison(tmp_path / 'c')}", argument])


def test_losses_crossed_at_another_step_are_left_out(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    crossed = json.loads((folder / "crossed.json").read_text())
    crossed["blockwise seed 2"]["step"] = 10
    (folder / "crossed.json").write_text(json.dumps(crossed))
    assert main([f"runs={folder}"]) == 0
    pairs = json.loads((folder / "verdict.json").read_text())["comparisons"]["blockwise"]["seeds"]
    assert [pair["crossed"]["baseline_in_arm"] for pair in pairs] == [3.5, None]


def test_a_look_counts_although_other_arms_were_compared_in_between(tmp_path: Path) -> None:
    def look(seeds: int, *arms: str) -> dict[str, Any]:
        runs = []
        for arm in arms:
            for seed in range(1, seeds + 1):
                path = tmp_path / arm / f"seed_{seed}"
                options = {"recipe": arm, "seed": seed, "init_hash": f"seed {seed}", "stream_hash": f"stream {seed}"}
                if not path.exists():
                    write_run(path, eval_loss=2.25 + 0.001 * seed * (arm != "bf16"), **options)
                runs.append(str(path))
        assert main([f"runs=[{','.join(runs)}]", f"run_dir={tmp_path / 'out'}"]) == 0
        return json.loads((tmp_path / "out" / "verdict.json").read_text())

    look(3, "bf16", "blockwise")
    assert len(look(2, "bf16", "rowwise")["looks"]) == 1
    again = look(4, "bf16", "blockwise")
    assert [one["seeds"] for one in again["looks"]] == [3, 4] and "up to 10 % together" in again["caveats"][-1]
