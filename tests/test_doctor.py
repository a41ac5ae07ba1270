from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fp8train import doctor
from fp8train.checkup import arithmetic, machine, ranks, training
from fp8train.checkup.outcome import Outcome, distance, relative, worst_row
from fp8train.checkup.subject import Subject
from fp8train.errors import ConfigError, exit_code
from tests.tiny_run import tiny_arguments, tiny_config

QUICK = "coverage,recipe,codes,equivariance,definition,ragged,nan,accumulation,weights"
MACHINE = "torch,numpy,cpu_kernels"
WHOLE = "coverage,siblings,evaluation,loss_scale,data_order"


def test_sound_model_passes_and_every_line_has_both_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--only", f"{MACHINE},{WHOLE}", *tiny_arguments(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    checks = [line for line in lines if line.startswith("pass")]
    assert [line.split()[1] for line in checks] == [*MACHINE.split(","), *WHOLE.split(",")]
    assert all(" | " in line for line in checks)
    assert lines[-1] == "8 of 8 passed"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["deepseek_v3", "tensorwise", "rowwise", "wgrad_bf16", "bf16", "fp32"])
def test_every_recipe_passes(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--only", QUICK, *tiny_arguments(tmp_path, f"recipe={recipe}")]) == 0, capsys.readouterr().out


def test_loss_is_of_a_token_and_what_became_of_a_nan_is_said(tmp_path: Path) -> None:
    subject = Subject(tiny_config(tmp_path), torch.device("cpu"))
    found = training.cached(subject)
    losses = [float(text.split()[-1]) for text in (found.first, found.second)]
    assert found.passed and losses[0] == losses[1] and 4 < losses[0] < 7, "near ln(257) after one step"
    found = arithmetic.nonfinite(subject)
    assert found.passed and ": NaN in one number of x" in found.first
    assert found.second == "0 % of that token's outputs or of that column of dw are finite"


def test_nan_that_is_laundered_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = arithmetic.ran

    def laundered(*arguments: object) -> tuple[torch.Tensor | None, ...]:
        return tuple(found if found is None else found.nan_to_num() for found in honest(*arguments))

    monkeypatch.setattr(arithmetic, "ran", laundered)
    found = arithmetic.nonfinite(Subject(tiny_config(tmp_path), torch.device("cpu")))
    assert not found.passed and found.second.startswith("100 % of that token's outputs")


def test_finding_gives_status_1_and_says_what_it_usually_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Outcome(passed=False, first="1 + 1 = 3", second="2", meaning="a broken adder.")
    monkeypatch.setitem(doctor.CHECKS, "data_order", lambda subject: bad)
    assert doctor.main(["--only=data_order", *tiny_arguments(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL  data_order" in out and "usually means: a broken adder." in out and "0 of 1 passed" in out


def test_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json", "--only", "data_order", *tiny_arguments(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert [check["name"] for check in found["checks"]][-1] == "data_order"
    assert all(check["first"] and check["second"] for check in found["checks"])


def test_check_that_crashes_is_a_finding_and_the_rest_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(subject: Subject) -> Outcome:
        raise RuntimeError("no kernel image\nand a long story")

    monkeypatch.setitem(doctor.CHECKS, "split", crash)
    subject = Subject(tiny_config(tmp_path), torch.device("cpu"))
    outcomes = doctor.examine(subject, ["split", "data_order"], lambda line: None)[-2:]
    assert [outcome.passed for outcome in outcomes] == [False, True]
    assert outcomes[0].second == "RuntimeError: no kernel image"


def test_every_printed_name_is_one_that_only_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU that torch does not see, the driver's own check has nothing to do."""
    good = Outcome(passed=True, first="1", second="1")
    for name in doctor.CHECKS:
        monkeypatch.setitem(doctor.CHECKS, name, lambda subject: good)
    monkeypatch.setattr(machine, "driver_cuda_version", lambda: "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    doctor.main(["--json", "--compile", *tiny_arguments(tmp_path)])
    printed = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    assert printed == [name for name in doctor.NAMES if name not in ("driver", "triton", "fp8_units")]
    assert doctor._split(["--only", ",".join(printed)])[0] == printed
    assert len(set(doctor.NAMES)) == len(machine.CHECKS) + len(doctor.CHECKS)


@pytest.mark.parametrize("way", [(), ("parallel=fsdp", "parallel.shard_ranks=4")], ids=["ddp", "fsdp"])
def test_two_processes_give_the_gradient_of_one(way: tuple[str, ...], tmp_path: Path) -> None:
    outcome = ranks.ranks(Subject(tiny_config(tmp_path, *way), torch.device("cpu")))
    assert outcome.passed and "2 ranks" in outcome.second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--only", "splt"], "nearest: split", id="unknown check"),
        pytest.param(["--skip"], "got no names", id="no name"),
        pytest.param(["--only", "nan", "--skip", "nan"], "got no checks", id="nothing left"),
        pytest.param(["recipe=blockwize"], "blockwize", id="unknown recipe"),
        pytest.param(["stepz=3"], "steps", id="unknown key"),
        pytest.param(["--fast"], "--fast", id="unknown flag"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(doctor.main, [*tiny_arguments(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_flags_choose_the_checks() -> None:
    default, as_json, overrides = doctor._split(["steps=3", "--json"])
    assert set(default) == set(doctor.NAMES) - {"compiled"} and as_json and overrides == ["steps=3"]
    assert "compiled" in doctor._split(["--compile"])[0]
    assert doctor._split(["--only", "compiled,split"])[0] == ["compiled", "split"]
    assert "split" not in doctor._split(["--skip=split"])[0]
    with pytest.raises(ConfigError, match="--only got 'x'"):
        doctor._split(["--only", "x"])


class TestMachine:
    @pytest.mark.parametrize(
        ("text", "numbers"), [("2.13.0+cpu", (2, 13)), ("12.8", (12, 8)), (None, (0, 0)), ("nightly", (0, 0))]
    )
    def test_version_reads_major_and_minor(self, text: str | None, numbers: tuple[int, int]) -> None:
        assert machine.major_minor(text) == numbers

    def test_old_torch_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "__version__", "2.4.1")
        found = machine.CHECKS["torch"]()
        assert not found.passed and "2.4.1" in found.first and "2.11" in found.second

    def test_numpy_that_torch_cannot_use_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(array: object) -> None:
            raise RuntimeError("Numpy is not available")

        monkeypatch.setattr(torch, "from_numpy", refuse)
        found = machine.CHECKS["numpy"]()
        assert not found.passed and found.detail == "Numpy is not available"

    def test_driver_older_than_torch_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for served, good in (("12.4", False), ("13.1", True), (None, False)):
            monkeypatch.setattr(machine, "driver_cuda_version", lambda served=served: served)
            assert machine.CHECKS["driver"]().passed is good
            assert machine.CHECKS["gpu"]() is None

    def test_gpu_that_torch_does_not_see_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "driver_cuda_version", lambda: "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert not machine.CHECKS["gpu"]().passed
        assert machine.CHECKS["driver"]() is None

    @pytest.mark.parametrize(("version", "good"), [("3.5.1", False), ("3.6.0", True), ("3.10.0", False), (None, False)])
    def test_triton_of_another_version_is_named(
        self, version: str | None, good: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine, "installed", lambda name: version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert machine.CHECKS["triton"]().passed is good


class TestDistances:
    def test_nan_is_infinitely_far_wherever_it_is(self) -> None:
        one = torch.ones(4)
        assert relative(one * 1.5, one) == 0.5 and relative(one * 0, one * 0) == 0.0
        broken = torch.tensor([1.0, float("nan"), 1.0, 1.0])
        assert relative(broken, one) == relative(one, broken) == float("inf")
        assert distance({"a": one, "b": one}, {"a": broken, "b": one * 2}) == (float("inf"), "a")

    def test_missing_gradient_is_infinitely_far(self) -> None:
        assert distance({"a": torch.ones(1)}, {}) == (float("inf"), "a")

    def test_worst_row_sees_a_small_row_beside_a_large_one(self) -> None:
        expected = torch.tensor([[1e6, 0.0], [1e-3, 0.0]])
        value = torch.tensor([[1e6, 0.0], [0.0, 0.0]])
        assert worst_row(value, expected) == 1.0 and relative(value, expected) < 1e-8


def test_noise_that_follows_every_bit_is_not_held_against_a_loss_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["model=quickstart", "recipe=placebo", "--only", "loss_scale"]) == 0
    assert "other magnitudes get other noise" in capsys.readouterr().out
