"""The report of a conversion: bytes, what ran, the operands, the table."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fp8train.backends import get_backend
from fp8train.backends.admission import Admission
from fp8train.backends.coverage import COUNTS
from fp8train.backends.cublaslt import CublasltBackend
from fp8train.backends.device_gemm import decoded_mm
from fp8train.backends.triton import TritonBackend
from fp8train.conversion_report import collapse, index_ranges
from fp8train.convert import convert_model
from fp8train.errors import RecipeError
from fp8train.nn.weights import OPERANDS
from fp8train.quant.formats import BLOCKWISE
from fp8train.recipe import available_recipes, load_recipe
from tests.convertible_model import EVERYTHING, Model
from tests.recipe_documents import document


@pytest.mark.parametrize("name", available_recipes())
def test_bytes_in_the_report_are_those_of_the_operands(name: str) -> None:
    model = Model()
    model.lm_head = model.head
    del model.head
    report = convert_model(model, name, backend="cpu_torch")
    for row in report.rows:
        linear = model.get_submodule(row.fqn)
        held = {name: operand for name in OPERANDS if (operand := getattr(linear, name)) is not None}
        scales = sum(b.numel() * b.element_size() for key, b in held.items() if "scale" in key)
        codes = sum(b.numel() * b.element_size() for key, b in held.items() if "scale" not in key)
        assert (row.code_bytes, row.scale_bytes) == (codes, scales), row.fqn
        assert row.master_bytes == sum(p.numel() * p.element_size() for p in linear.parameters())


def test_coverage_counts_what_ran() -> None:
    model = Model()
    report = convert_model(model, EVERYTHING, backend="cpu_torch")
    COUNTS.reset()
    model(torch.randn(5, 24)).sum().backward()
    coverage = report.coverage()
    linears = {entry["fqn"]: entry for entry in coverage["linears"]}
    up, router = linears["layers.1.up"]["gemms"], linears["layers.1.router"]["gemms"]
    counted = {"fp8_calls": 1, "other_calls": 0, "fp8_rows": 5, "other_rows": 0}
    assert up["wgrad"] == {"planned": "fp8", **counted, "exception": None}
    assert router["fprop"].pop("exception").startswith("bf16: Block.keep_high_precision")
    assert router["fprop"] == {"planned": "bf16", "fp8_calls": 0, "other_calls": 1, "fp8_rows": 0, "other_rows": 5}
    fp8 = 3 * 2 * (2 * 24 * 40 + 2 * 24 * 40 + 24 * 10)  # two blocks (up, down) and the head
    fp8 -= 2 * 24 * 40  # the input of the first layer has no gradient, so its up runs no dgrad
    other = 3 * 2 * 2 * 24 * 3 - 2 * 24 * 3
    assert coverage["fp8_flops_share"] == pytest.approx(fp8 / (fp8 + other), rel=1e-12)
    assert (coverage["backend"], coverage["emulates"]) == ("cpu_torch", True)
    COUNTS.reset()
    assert report.coverage()["fp8_flops_share"] == 0
    json.dumps(coverage, allow_nan=False)


@pytest.fixture
def backends_of_its_own() -> Iterator[None]:
    """Other objects than the rest of the process has: what they were refused stays here."""
    get_backend.cache_clear()
    yield
    get_backend.cache_clear()


@pytest.mark.parametrize("backend", ["triton", "cublaslt"])
@pytest.mark.usefixtures("backends_of_its_own")
def test_coverage_names_the_kernels_that_were_refused_since(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
    for kind in (TritonBackend, CublasltBackend):
        monkeypatch.setattr(kind, "unavailable", lambda self, device_type: None)
        monkeypatch.setattr(kind, "unsupported", lambda self, precision: None)
    monkeypatch.setattr(CublasltBackend, "scaled_mm", staticmethod(decoded_mm))

    def admits(self: Admission, operation: str, entry: str, device: torch.device) -> bool:
        self._verdicts[operation, entry, 0] = None if operation == "gemm" else "it loses bytes"
        return operation == "gemm"

    monkeypatch.setattr(Admission, "admits", admits)
    model = Model()
    report = convert_model(model, EVERYTHING, backend=backend)
    weights = [f"quantize_weight {name}: it loses bytes" for name in ("one_read", "two_launches")]
    assert report.coverage()["refused_kernels"] == weights
    model(torch.randn(5, 24)).sum().backward()
    refused = json.loads(json.dumps(report.coverage()))["refused_kernels"]
    assert {"quantize dual: it loses bytes", *weights} < set(refused)
    assert ("gemm_wgrad pointer_64x64_s3: it loses bytes" in refused) is (backend == "triton")
    assert not [name for name in refused if name.startswith("gemm ")]


def test_report_is_plain_data() -> None:
    report = convert_model(Model(), "bf16", backend="cpu_torch")
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["recipe_hash"] == load_recipe("bf16").hash
    first = document["linears"][0]
    assert (first["fqn"], first["shape"], first["fprop"]) == ("layers.0.up", [40, 24], "bf16")


def test_row_names_the_operands() -> None:
    row = convert_model(Model(), EVERYTHING, backend="cpu_torch").rows[0]
    assert (row.fprop, row.dgrad, row.wgrad) == tuple(BLOCKWISE.describe(gemm) for gemm in ("fprop", "dgrad", "wgrad"))
    assert (row.out_features, row.in_features, row.precision, row.rule) == (40, 24, "fp8", "1: *")


def test_matrices_outside_linears_are_listed() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "embed": nn.Embedding(4, 4), "out": nn.Linear(4, 4)})
    report = convert_model(model, EVERYTHING, backend="cpu_torch")
    assert [(row.fqn, row.kind) for row in report.others] == [("conv", "Conv1d")]
    line = "conv (Conv1d), 75.0 % of the matrix parameters"
    assert report.table().splitlines()[-1] == f"not reached: {line}"
    assert report.coverage()["not_reached"] == [line]


def test_experts_of_all_layers_are_one_line_and_a_rule_for_them_is_told_why_it_matches_none() -> None:
    model = Model()
    for layer in model.layers:
        layer.experts = nn.Module()
        layer.experts.gate_up_proj = nn.Parameter(torch.ones(2, 24, 80))
    for match in ("*experts", "*experts.gate_up_proj"):
        with pytest.raises(RecipeError, match=r"matches none of the 7 linears.*It matches 'layers.0.experts.*Module"):
            convert_model(model, document({"match": match, "use": "fp8"}, {"match": "*", "use": "fp8"}))
    table = convert_model(model, EVERYTHING, backend="cpu_torch").table()
    # 7680 of them and 2 * 2 * 960 + 2 * 72 + 240 of linears
    assert table.splitlines()[-1] == "not reached: layers.*.experts (Module), 64.5 % of the matrix parameters"


def test_table_joins_layers_that_are_alike() -> None:
    model = Model(num_layers=12)
    rules = {"layers": "first:1", "use": "bf16"}, {"layers": "last:2", "use": "bf16"}, {"match": "*", "use": "fp8"}
    report = convert_model(model, document(*rules), backend="cpu_torch")
    labels = {label: count for label, count, _ in collapse(report.rows)}
    assert labels["layers.0.up"] == 1 and labels["layers.{1..9}.up"] == 9 and labels["layers.{10,11}.up"] == 2
    assert sum(labels.values()) == len(report.rows)
    assert len(report.table(every=True).splitlines()) == len(report.rows) + 1


def test_table_joins_experts_and_layers() -> None:
    experts = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(8))}) for _ in range(3)
    )
    report = convert_model(nn.ModuleDict({"layers": experts}), EVERYTHING, backend="cpu_torch")
    assert [(label, count) for label, count, _ in collapse(report.rows)] == [("layers.{0..2}.experts.{0..7}", 24)]


@pytest.mark.parametrize(
    ("indices", "text"), [([0], "{0}"), ([3, 2], "{2,3}"), ([0, 1, 2], "{0..2}"), ([0, 2, 3, 4, 9], "{0,2..4,9}")]
)
def test_index_ranges(indices: list[int], text: str) -> None:
    assert index_ranges(indices) == text
