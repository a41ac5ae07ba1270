"""The held-out loss of each source of a mix, from metrics.jsonl to verdict, report and console."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8train.report.document import build_report
from fp8train.report.results import _source_table
from fp8train.report.run_record import Arms, read_run
from fp8train.report.summary import summary
from tests.run_folders import verdict_of, write_diverged_run, write_run

BASE = {"stdlib": 2.0, "notes <1>.txt": 4.0}


def arms_of(folder: Path, *, base: dict[str, float] | None = BASE, **changes: Any) -> Arms:
    bf16 = write_run(folder / "bf16", sources=base)
    fp8 = write_run(
        folder / "fp8", **{"recipe": "blockwise", "sources": {"stdlib": 2.1, "notes <1>.txt": 3.9}} | changes
    )
    return {"bf16": {1: read_run(bf16)}, "blockwise": {1: read_run(fp8)}}


def test_losses_and_gaps_of_each_source(tmp_path: Path) -> None:
    arms = arms_of(tmp_path)
    assert np.isnan(arms["bf16"][1].evals.columns["eval_loss/stdlib"][0]), "the first evaluation has none"
    verdict = verdict_of(arms)
    (run,), (pair,) = verdict["arms"]["bf16"]["runs"], verdict["comparisons"]["blockwise"]["seeds"]
    assert run["eval_losses"] == BASE
    assert pair["source_gaps"] == pytest.approx({"stdlib": 5.0, "notes <1>.txt": -2.5})
    assert verdict["comparisons"]["blockwise"]["mean"]["source_gaps"] == pair["source_gaps"]
    report, text = build_report(verdict, arms), summary(verdict, arms)
    assert "Held-out loss by source" in report and "notes &lt;1&gt;.txt" in report and "notes <1>" not in report
    assert "2.1000 (+5.00\u202f%)" in report and "3.9000 (\u22122.50\u202f%)" in report
    (line,) = (line for line in text.splitlines() if line.startswith("  of notes <1>.txt"))
    assert line.split()[3:] == ["4.0000", "3.9000", "(-2.50", "%)"]


def test_one_source_has_no_table_of_sources(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, base=None, sources=None)
    verdict = verdict_of(arms)
    assert _source_table(verdict) == "" and "by source" not in build_report(verdict, arms)
    assert "  of " not in summary(verdict, arms)


@pytest.mark.parametrize("without", ["bf16", "blockwise"])
def test_a_run_of_an_earlier_version_knows_no_sources(without: str, tmp_path: Path) -> None:
    """The other's are shown, without a gap."""
    arms = arms_of(tmp_path, **({"base": None} if without == "bf16" else {"sources": None}))
    verdict = verdict_of(arms)
    assert verdict["comparisons"]["blockwise"]["seeds"][0]["source_gaps"] == {}
    assert "Held-out loss by source" in build_report(verdict, arms)
    assert "  of stdlib" in summary(verdict, arms)


def test_a_run_that_diverged_has_no_losses_of_sources(tmp_path: Path) -> None:
    arms = arms_of(tmp_path)
    diverged = write_diverged_run(tmp_path / "diverged", recipe="blockwise", sources={"stdlib": 3.0})
    kept = (diverged / "metrics.jsonl").read_text()
    (diverged / "metrics.jsonl").write_text(kept.replace('"eval_loss":', '"eval_loss/stdlib": 2.5, "eval_loss":'))
    arms = {**arms, "blockwise": {1: read_run(diverged)}}
    verdict = verdict_of(arms)
    assert verdict["arms"]["blockwise"]["runs"][0]["eval_losses"] == {}
    assert "Held-out loss by source" in build_report(verdict, arms) and "  of stdlib" in summary(verdict, arms)
    json.dumps(verdict, allow_nan=False)
