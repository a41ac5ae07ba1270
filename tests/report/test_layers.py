"""Worst layers: from telemetry rows to a table, a picture and the rounding errors beside the placebo's noise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fp8train.report.layers import layers_section, operand_errors
from fp8train.report.run_record import Arms, read_run
from fp8train.telemetry.statistics import STATS
from fp8train.telemetry.table import to_row
from tests.run_folders import verdict_of, write_run

LINEARS = ("layers.0.self_attn.o_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj")


def sampled(step: int, worst: float, **changes: Any) -> dict[str, Any]:
    """A row of telemetry: row errors of 3 %, but `worst` for x of the last linear."""
    values = {}
    for fqn in LINEARS:
        for operand in ("x", "w", "dy"):
            error = worst if (fqn, operand) == (LINEARS[-1], "x") else 0.03
            stats = dict.fromkeys(STATS, 0.0) | {"row_error_p99": error, "row_error_max": error, "sqnr_db": 31.5}
            values[f"{fqn}/{operand}"] = [(stats | changes)[name] for name in STATS]
    return {"step": step, **to_row(values, [], 0.01)}


def arms_with(tmp_path: Path, *rows: dict[str, Any]) -> Arms:
    folder = write_run(tmp_path / "fp8", recipe="blockwise")
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    placebo = write_run(tmp_path / "placebo", recipe="placebo")
    arms = {"bf16": write_run(tmp_path / "bf16"), "placebo": placebo, "blockwise": folder}
    return {arm: {1: read_run(path)} for arm, path in arms.items()}


def section(arms: Arms) -> str:
    return "\n".join(layers_section(verdict_of(arms), arms))


def test_worst_operand_comes_first_and_the_picture_is_darkest_there(tmp_path: Path) -> None:
    text = section(arms_with(tmp_path, sampled(10, 0.05), sampled(20, 0.09)))
    first = re.search(r"<tbody>\n(<tr>.*?</tr>)", text[text.index("Worst operands") :])
    assert first is not None and "layers.1.mlp.down_proj" in first[1] and ">x<" in first[1] and "9\u202f%" in first[1]
    shades = [float(shade) for shade in re.findall(r'fill-opacity="([\d.]+)"', text)]
    assert len(shades) == 4, "two layers, two steps" and shades
    assert shades.index(max(shades)) == 3 and "worst: layers.1 at step 20" in text


def test_rounding_error_stands_beside_the_noise_of_the_placebo(tmp_path: Path) -> None:
    arms = arms_with(tmp_path, sampled(10, 0.05))
    assert operand_errors(arms["blockwise"][1]) == pytest.approx(dict.fromkeys(("x", "w", "dy"), 10 ** (-31.5 / 20)))
    text = section(arms)
    assert text.count("2.65\u202f%") == 3 and "noise, as set" in text and text.count("2.66\u202f%") == 3


def test_non_finite_operand_is_outlined(tmp_path: Path) -> None:
    text = section(arms_with(tmp_path, sampled(10, 0.05, nonfinite=3)))
    assert text.count("stroke=") == 2 and "worst: layers.0 at step 10" in text


def test_long_run_is_gathered_into_few_columns_that_keep_the_worst(tmp_path: Path) -> None:
    rows = [sampled(step, 0.9 if step == 333 else 0.04) for step in range(1, 501)]
    text = section(arms_with(tmp_path, *rows))
    assert text.count("<rect") == 2 * 48 and text.count('fill-opacity="1.00"') == 1


def test_run_without_samples_says_so(tmp_path: Path) -> None:
    assert "No run sampled the operands" in section(arms_with(tmp_path))
