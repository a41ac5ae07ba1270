from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8train.backends.coverage import COUNTS, GEMMS, GemmCount
from fp8train.backends.interface import Backend
from fp8train.conversion_report import exception
from fp8train.convert import convert_model
from fp8train.errors import TrainingError
from fp8train.nn import linear_function
from fp8train.quant.formats import BF16
from fp8train.trainer import assembly as assembly_module
from fp8train.trainer.strict_coverage import StepAudit, raise_problems, swapped_precisions
from tests.tiny_run import tiny_train


class Net(nn.Module):
    """Two linears in a row, one beside them, and ways to use them wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 128)
        self.second = nn.Linear(128, 128)
        self.spare = nn.Linear(128, 128)
        self.way = "good"

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.way == "around":
            return F.linear(h, self.second.weight, self.second.bias)
        if self.way == "dead end":
            self.spare(h)
        return self.second(h)


RECIPE = {
    "version": 1,
    "precisions": {
        "fp8": {
            "fprop": {"x": "e4m3 1x128", "w": "e4m3 128x128"},
            "dgrad": {"dy": "e4m3 1x128", "w": "e4m3 128x128"},
            "wgrad": {"dy": "e4m3 1x128", "x": "e4m3 1x128"},
        }
    },
    "rules": [{"match": "*", "use": "fp8"}],
}


def audited(prepare=lambda net: None, backward: bool = True, rows: int = 8, compiled: bool = False):
    """Problems and reasons of one step of a fresh net; reasons by "module gemm"."""
    torch.manual_seed(0)
    net = Net()
    report = convert_model(net, RECIPE)
    prepare(net)
    audit = StepAudit(SimpleNamespace(model=net, report=report), compiled)
    audit.begin()
    y = net(torch.randn(rows, 128))
    if backward:
        y.sum().backward()
    problems, reasons = audit.end()
    names = {row.site: row.fqn for row in report.rows}
    return problems, {f"{names[site]} {gemm}": reason for (site, gemm), reason in reasons.items()}


UNUSED = {f"spare {gemm}": "no tokens reached it" for gemm in GEMMS}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "as if compiled"])
def test_step_in_fp8_is_no_problem_and_unused_gemms_have_a_reason(compiled: bool) -> None:
    problems, reasons = audited(compiled=compiled)
    if compiled:  # the net reads plain numbers, which only hooks can tell from a missing dgrad
        assert problems == [p for p in problems if p.startswith("dgrad of first")]
        return
    assert problems == []
    assert reasons == UNUSED | {"first dgrad": "its input needs no gradient"}


def test_frozen_weight_has_a_reason() -> None:
    problems, reasons = audited(lambda net: net.second.weight.requires_grad_(False))
    assert problems == [] and reasons["second wgrad"] == "its weight is frozen"


def test_dead_end_forward_without_gradient_and_empty_batch_have_a_reason() -> None:
    problems, reasons = audited(lambda net: setattr(net, "way", "dead end"))
    assert problems == []
    assert {reasons[f"spare {gemm}"] for gemm in ("dgrad", "wgrad")} == {"no gradient reached its output"}
    problems, reasons = audited(backward=False)
    assert problems == [] and reasons["second wgrad"] == "no gradient reached its output"
    problems, reasons = audited(rows=0)
    assert problems == [] and reasons["second fprop"] == "no tokens reached it"


def test_weight_that_is_used_around_its_module_is_a_problem() -> None:
    problems, _ = audited(lambda net: setattr(net, "way", "around"))
    assert len(problems) == 1
    assert "fprop of second was to run in FP8" in problems[0] and "without calling it" in problems[0]


def test_forward_of_its_own_is_a_problem() -> None:
    def replace(net: Net) -> None:
        net.second.forward = lambda x: F.linear(x, net.second.weight.detach(), net.second.bias)

    problems, _ = audited(replace)
    assert any("fprop of second" in problem and "0 of 8 rows" in problem for problem in problems)


def test_module_that_was_replaced_after_conversion_is_a_problem() -> None:
    problems, _ = audited(lambda net: setattr(net, "second", nn.Linear(128, 128)))
    assert problems == ["second is no longer in the model: something replaced it after the conversion"]


def test_gemm_that_runs_in_high_precision_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm = linear_function.gemm

    def fall_back(left, right, **options):
        if options["name"] != "wgrad":
            return gemm(left, right, **options)
        wide = [linear_function.Operand(torch.ones(q.data.shape, dtype=torch.bfloat16)) for q in (left, right)]
        return gemm(*wide, **options)

    monkeypatch.setattr(linear_function, "gemm", fall_back)
    problems, _ = audited()
    assert [p.split(" was")[0] for p in problems] == ["wgrad of first", "wgrad of second"]
    assert all("ran 8 rows in high precision" in problem for problem in problems)


def test_skipped_micro_batch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    add = COUNTS.add
    monkeypatch.setattr(
        COUNTS, "add", lambda site, gemm, rows, fp8: add(site, gemm, rows // (2 if gemm == "dgrad" else 1), fp8)
    )
    problems, _ = audited()
    assert len(problems) == 1 and "dgrad of second" in problems[0] and "4 of 8 rows" in problems[0]


@pytest.mark.parametrize("kind", ["full", "selective", "none"])
def test_activation_checkpointing_is_no_problem(kind: str, tmp_path: Path) -> None:
    result = tiny_train(tmp_path, f"activation_checkpointing={kind}", "steps=1")
    assert result.finished


def test_run_ends_after_its_first_step_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = assembly_module.convert_model

    def emulation_that_drops_the_recipe(model, *args, **options):
        report = convert(model, *args, **options)
        model.layers[0].mlp.down_proj.set_precision(BF16)
        return report

    monkeypatch.setattr(assembly_module, "convert_model", emulation_that_drops_the_recipe)
    with pytest.raises(TrainingError, match=r"after step 1, layers.0.mlp.down_proj was converted to fp8.*strict=false"):
        tiny_train(tmp_path)
    assert tiny_train(tmp_path, "strict=false", "steps=2", run="lax").finished


def test_precision_that_a_schedule_sets_is_no_problem() -> None:
    problems, reasons = audited(lambda net: net.second.set_precision(BF16))
    assert problems == [] and "bf16 at this step" in reasons["second fprop"]


def test_precision_other_than_the_reports_is_found() -> None:
    net = Net()
    report = convert_model(net, RECIPE)
    assert swapped_precisions(SimpleNamespace(model=net, report=report)) == []
    net.first.set_precision(BF16)
    (found,) = swapped_precisions(SimpleNamespace(model=net, report=report))
    assert found.startswith("first was converted to fp8 and is set to bf16")


def test_message_is_short_however_many_problems() -> None:
    with pytest.raises(TrainingError, match="a; b; c; and 7 more. Correct"):
        raise_problems(list("abcdefghij"), 1)
    raise_problems([], 1)


def test_coverage_file_gives_the_reason_of_each_exception(tmp_path: Path) -> None:
    tiny_train(tmp_path, "steps=2", "eval.every=1")
    linears = {row["fqn"]: row for row in json.loads((tmp_path / "run" / "coverage.json").read_text())["linears"]}
    kept = {gemm: linears["lm_head"]["gemms"][gemm]["exception"] for gemm in GEMMS}
    assert all(text.startswith("bf16: ") and "lm_head" in text for text in kept.values())
    assert all(linears["layers.0.mlp.down_proj"]["gemms"][gemm]["exception"] is None for gemm in GEMMS)


def test_reason_of_a_gemm_without_tokens_is_the_right_one() -> None:
    """Without a trainer, which says more."""
    whole = nn.ModuleDict({"layers": nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))})
    report = convert_model(whole, "blockwise", "cpu_torch")
    model = whole["layers"]
    model[1].weight.requires_grad_(False)
    rows = {row.fqn.removeprefix("layers."): row for row in report.rows}
    model[1](model[0](torch.randn(8, 128))).sum().backward()
    counts = COUNTS.snapshot()

    def said(fqn: str, gemm: str) -> str | None:
        own = counts.get(rows[fqn].site, {})
        return exception(rows[fqn], gemm, own.get(gemm, GemmCount()), own.get("fprop", GemmCount()))

    assert said("0", "fprop") is None
    assert said("0", "dgrad") == said("1", "wgrad") == "no gradient was asked of it"
    assert said("2", "fprop") == said("2", "wgrad") == "no tokens reached it"
    model[0].set_precision(BF16)
    COUNTS.reset()
    model[0](torch.randn(8, 128))
    counts = COUNTS.snapshot()
    assert said("0", "fprop") == "ran in high precision: its precision was changed during the run"


def test_linears_that_were_left_alone_are_said_not_to_be_counted() -> None:
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(128, 128)]), "own": Own(128, 128)})
    report = convert_model(model, "blockwise", "cpu_torch")
    assert report.coverage()["uncounted"] == ["own"]


def test_coverage_file_names_kernels_that_were_refused_by_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refused(self: Backend) -> list[str]:
        asked.append(len(asked))
        return [] if len(asked) == 1 else ["gemm x: it hung"]

    monkeypatch.setattr(Backend, "refused", property(refused))
    tiny_train(tmp_path, "steps=2", "eval.every=1")
    assert json.loads((tmp_path / "run" / "coverage.json").read_text())["refused_kernels"] == ["gemm x: it hung"]
    assert len(asked) > 1, "coverage was added up of several parts"


def test_coverage_of_a_recipe_without_wgrad_says_so(tmp_path: Path) -> None:
    tiny_train(tmp_path, "steps=1", "recipe=wgrad_bf16")
    linears = {row["fqn"]: row for row in json.loads((tmp_path / "run" / "coverage.json").read_text())["linears"]}
    gemms = linears["layers.0.mlp.down_proj"]["gemms"]
    assert gemms["fprop"]["exception"] is None and "precision" in gemms["wgrad"]["exception"]
