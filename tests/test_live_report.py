"""Reports of models that are there, however they came to be."""

from __future__ import annotations

import copy

import pytest
import torch

import fp8train
from fp8train.backends.coverage import COUNTS
from tests.convertible_model import EVERYTHING, Model


def test_a_copy_reports_what_it_ran_itself() -> None:
    model = Model()
    model.layers[1].up = model.layers[0].up
    report = fp8train.convert_model(model, EVERYTHING, backend="cpu_torch")
    clone = copy.deepcopy(model)
    COUNTS.reset()
    clone(torch.randn(5, 24)).sum().backward()
    of_clone = fp8train.report_of(clone)
    assert report.coverage()["fp8_flops_share"] == 0
    assert of_clone.coverage()["fp8_flops_share"] > 0.9
    assert of_clone.planned_fp8_share() == report.planned_fp8_share()
    facts = [[(row.fqn, row.shape, row.fprop, row.other_names) for row in each.rows] for each in (of_clone, report)]
    assert facts[0] == facts[1]
    assert "layers.0.up" in of_clone.table()


def test_a_model_that_was_not_converted_has_no_report() -> None:
    with pytest.raises(ValueError, match="Model has no Float8Linear; .*Call convert_model first"):
        fp8train.report_of(Model())
