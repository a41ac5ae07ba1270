from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fp8train.backends.coverage import COUNTS
from fp8train.convert import convert_model
from fp8train.data import Batcher, build_dataset
from fp8train.distributed import World
from fp8train.metrics import read_metrics
from fp8train.nn.weights import named_linears
from fp8train.quant.formats import BF16, BLOCKWISE, QuantSpec
from fp8train.recipe import load_recipe
from fp8train.telemetry.observer import Observer, operand_specs, uncounted, what_if_precision
from fp8train.telemetry.statistics import STATS, as_numbers, operand_statistics
from fp8train.telemetry.table import Sample, first_nonfinite, samples, to_row, worst, worst_table
from fp8train.trainer.assembly import assemble
from fp8train.trainer.console import Console
from fp8train.trainer.step import train_step
from fp8train.trainer.telemetry_watcher import TelemetryWatcher
from tests.tiny_run import tiny_config, tiny_train


class Pair(nn.Module):
    """Two linears that read one input, and a third that is kept in BF16."""

    keep_high_precision = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(128, 64), nn.Linear(128, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.left(x) + self.right(x))


@pytest.fixture
def model() -> Pair:
    torch.manual_seed(3)
    model = Pair()
    convert_model(model, {"version": 1, "precisions": {"fp8": {
        "fprop": {"x": "e4m3 1x128", "w": "e4m3 128x128"}, "dgrad": {"dy": "e4m3 1x128", "w": "e4m3 128x128"},
        "wgrad": {"dy": "e4m3 1x128", "x": "e4m3 1x128"}}}, "rules": [{"match": "*", "use": "fp8"}]})  # fmt: skip
    return model


def test_observes_the_operands_that_the_gemms_read_and_leaves_nothing_behind(model: Pair):
    linears = named_linears(model)
    x = torch.randn(32, 128, requires_grad=True)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    observer = Observer(linears, BLOCKWISE, None)
    observer.begin()
    model(x).sum().backward()
    values = observer.end()
    spec = operand_specs(BLOCKWISE)
    assert list(values) == [
        f"{name}/{op}" for name in ("left", "right", "head") for op in ("x", "w", "dy", "x.T", "dy.T")
    ]
    assert values["left/x"] == values["right/x"] == as_numbers(operand_statistics(x, spec["x"]))
    assert values["left/w"] == as_numbers(operand_statistics(model.left.weight, spec["w"]))
    assert observer.what_if == ["head"]
    assert values["head/dy"] == as_numbers(operand_statistics(torch.ones(32, 32), spec["dy"]))
    assert values["left/x.T"] == values["right/x.T"] == as_numbers(operand_statistics(x.t(), spec["x.T"]))
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, model.parameters(), strict=True))
    assert not any(linear._forward_hooks for linear in linears.values())


def test_wgrad_reads_blocks_of_tokens_and_a_large_token_drowns_its_own_block_there(model: Pair):
    observer = Observer(named_linears(model), BLOCKWISE, None)
    observer.begin()
    x = torch.randn(256, 128)
    x[::128] = 1e8  # a scale of 2^18: codes of what is below 2^-10 of it are zero
    model(x).sum().backward()
    values = observer.end()
    flushed = STATS.index("underflow_frac")
    assert values["left/x"][flushed] == 0 and values["left/x.T"][flushed] == pytest.approx(127 / 128, abs=1e-3)


@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        ({"fprop": {"x": "e4m3 tensor", "w": "e4m3 tensor"}, "wgrad": {"x": "e4m3 tensor", "dy": "e4m3 tensor"}},
         ["x", "w", "dy.T"]),
        ({"wgrad": {"x": "e4m3 1x128", "dy": "e4m3 1x128"}}, ["x.T", "dy.T"]),
        ({"fprop": {"x": "e4m3 row", "w": "e4m3 row"}, "dgrad": {"dy": "e5m2 row", "w": "e4m3 row"}},
         ["x", "w", "dy", "w.T"]),
    ],
    ids=["square blocks are alike when turned", "wgrad alone", "rows"],
)  # fmt: skip
def test_operands_are_those_that_gemms_read(document: dict, wanted: list[str]):
    recipe = load_recipe({"version": 1, "precisions": {"fp8": document}, "rules": [{"match": "*", "use": "fp8"}]})
    assert list(operand_specs(recipe.precisions["fp8"])) == wanted


def test_only_the_first_pass_after_begin_counts(model: Pair):
    observer = Observer(named_linears(model), BLOCKWISE, None)
    observer.begin()
    model(torch.ones(8, 128))
    model(torch.full((8, 128), 100.0))
    assert observer.end()["left/x"][0] == 1.0


def test_uncounted_runs_leave_the_counts_alone(model: Pair):
    COUNTS.reset()
    with uncounted(named_linears(model).values()):
        model(torch.ones(8, 128))
    assert COUNTS.snapshot() == {}
    model(torch.ones(8, 128))
    assert len(COUNTS.snapshot()) == 3


def test_what_if_takes_the_precision_in_most_use():
    other = BLOCKWISE.__class__("other", fprop=BLOCKWISE.fprop)
    assert what_if_precision([BF16, other, BLOCKWISE, BLOCKWISE]) == BLOCKWISE
    assert what_if_precision([BF16, other]) == other
    assert what_if_precision([BF16]) == BLOCKWISE


def sample(fqn: str, error: float | None, nonfinite: float = 0.0) -> Sample:
    return Sample(step=1, fqn=fqn, operand="x", stats={"row_error_p99": error, "nonfinite": nonfinite}, what_if=False)


def test_worst_are_non_finite_ones_then_large_errors_then_by_name():
    found = [sample("b", 0.1), sample("a", 0.1), sample("c", 0.5), sample("nan", 0.01, nonfinite=3), sample("d", 0.01)]
    assert [s.fqn for s in worst(found, 4)] == ["nan", "c", "a", "b"]


def test_non_finite_numbers_begin_in_forward_or_last_in_the_model_in_backward():
    def broken(*pairs: tuple[str, str]) -> list[Sample]:
        return [
            Sample(step=1, fqn=fqn, operand=operand, stats={"nonfinite": float((fqn, operand) in pairs)}, what_if=False)
            for fqn in "abc"
            for operand in ("x", "w", "dy", "x.T", "dy.T")
        ]

    for pairs, first in (
        ([("b", "w"), ("c", "x"), ("a", "dy")], ("b", "w")),
        ([("a", "dy"), ("b", "dy"), ("b", "dy.T")], ("b", "dy.T")),
        ([], None),
    ):
        found = first_nonfinite(broken(*pairs))
        assert (None if found is None else (found.fqn, found.operand)) == first


def test_of_an_operand_without_a_finite_block_no_error_is_told():
    x = torch.ones(4, 128)
    x[1, 3] = torch.inf
    values = dict(zip(STATS, as_numbers(operand_statistics(x, operand_specs(BLOCKWISE)["x"])), strict=True))
    assert values["row_error_p99"] == 0 and values["nonfinite"] == 1
    tensor = QuantSpec.parse("e4m3 tensor")
    values = dict(zip(STATS, as_numbers(operand_statistics(x, tensor)), strict=True))
    undefined = ("row_error_p99", "row_error_max", "underflow_frac", "saturated_frac", "sqnr_db")
    assert [values[name] for name in undefined] == [None] * 5 and values["nonfinite"] == 1


class TestRun:
    def test_rows_are_sampled_and_training_is_as_without(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        tiny_train(tmp_path, "telemetry.every=3", run="on", console=Console(6))
        tiny_train(tmp_path, "telemetry.every=null", run="off")
        on, off = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("on", "off"))
        assert [row["loss"] for row in on if "loss" in row] == [row["loss"] for row in off if "loss" in row]
        sampled = [row for row in on if "fp8/columns" in row]
        assert [row["step"] for row in sampled] == [3, 6]
        assert not any(key.startswith("fp8/") for row in off for key in row)
        found = list(samples(sampled[-1]))
        assert len(found) == 8 * 5 and {s.fqn for s in found if s.what_if} == {"lm_head"}
        assert all(28 < s.stats["sqnr_db"] < 36 for s in found)  # E4M3 in blocks: 31.6 dB for normal data
        out = capsys.readouterr().out
        assert "operands that lose most precision, at step 6" in out and "lm_head dy" in out

    def test_samples_fall_on_logged_steps(self, tmp_path: Path):
        tiny_train(tmp_path, "telemetry.every=3", "log.every=2", "steps=8")
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert [row["step"] for row in rows if "fp8/columns" in row] == [4, 8]

    @pytest.mark.parametrize("choice", ["full", "selective"])
    def test_recomputation_is_not_sampled_twice(self, choice: str, tmp_path: Path):
        for run, option in (("plain", "none"), ("recomputed", choice)):
            tiny_train(tmp_path, "telemetry.every=2", "steps=2", f"activation_checkpointing={option}", run=run)
        a, b = ([list(samples(r)) for r in read_metrics(tmp_path / run / "metrics.jsonl") if "fp8/columns" in r]
                for run in ("plain", "recomputed"))  # fmt: skip
        assert a == b

    def test_bf16_run_has_what_if_values_only(self, tmp_path: Path):
        tiny_train(tmp_path, "telemetry.every=2", "steps=2", "recipe=bf16")
        row = next(r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "fp8/columns" in r)
        assert len(list(samples(row))) == 40 and all(s.what_if for s in samples(row))


def test_table_survives_statistics_that_are_not_defined():
    row = {"step": 1, **to_row({"a/x": [None] * 10}, [], 0.1)}
    assert worst_table(row).splitlines()[1].split()[:3] == ["a", "x", "quantised"]


class TestCompiled:
    def test_sample_of_a_compiled_model_is_that_of_the_eager_one_and_leaves_no_trace(self, tmp_path: Path):
        config = tiny_config(tmp_path, "telemetry.every=1")
        assembly = assemble(config, torch.device("cpu"))
        dataset = build_dataset(config.data, config.seq_len, config.seed)
        batches = Batcher(dataset, config.global_batch_samples, config.global_batch_samples).micro_batches(0)
        optimizer = torch.optim.SGD(assembly.model.parameters(), lr=0.0)
        rows = []
        for compiled in (False, True):
            config.compile = compiled  # the watcher then looks in a pass of its own
            watcher = TelemetryWatcher(config, assembly, World(), lambda text: None)
            COUNTS.reset()
            watcher.before_step(1, batches)
            assert all(parameter.grad is None for parameter in assembly.model.parameters())
            assert COUNTS.snapshot() == {}
            result = train_step(assembly.model, optimizer, batches, World(), clip=None)
            rows.append(watcher.after_step(1, result))
            assert rows[-1].pop("fp8/seconds") > 0
        assert rows[0] == rows[1]
