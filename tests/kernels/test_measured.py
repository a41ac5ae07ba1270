"""kernels/README.md says of hardware what kernels/results/ holds, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from tests.kernels import measured


def test_readme_has_what_was_measured() -> None:
    assert measured.section_in_readme() == measured.section(measured.RESULTS)


def test_without_results_nothing_is_claimed(tmp_path: Path) -> None:
    assert measured.section(tmp_path).splitlines()[1:-1] == ["", "Not measured on hardware yet.", ""]


def test_figures_are_those_of_the_files_newest_first(tmp_path: Path) -> None:
    environment = {
        "torch": "2.11", "triton": "3.6.0", "cuda": "13.0", "python": "3.12", "git_commit": "0123456789abcdef",
        "git_dirty": False, "device": {"name": "NVIDIA H200"},
    }  # fmt: skip
    timings = {
        "bf16": {"median_seconds": 0.002, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0},
        "triton": {"median_seconds": 0.001, "ratio": 0.5, "ratio_low": 0.48, "ratio_high": 0.53},
    }
    gemm = {"title": "fprop M 4096", "timings": timings, "flops": 1e12, "wrong": {"triton": 0.1}}
    both = {"title": "quantize both", "timings": timings, "bytes": {"bf16": 4e9, "triton": 3e9}}
    step_result = {"title": "training step", "timings": timings, "tokens": 8192}
    bench = {"subject": "gemm", "arguments": {"rounds": 11}}
    for date, steps in (("2026-12-01", ("one", "two")), ("2026-12-02", ("two",)), ("2026-12-03", ())):
        content = {"environment": environment, "machine": "name, clock\nNVIDIA H200, 1980 MHz\n"}
        content |= {step: bench | {"results": [gemm, both, step_result]} for step in steps}
        (tmp_path / f"{date}.json").write_text(json.dumps(content))
    text = measured.section(tmp_path)
    assert text.index("### 2026-12-02: NVIDIA H200") < text.index("### 2026-12-01: NVIDIA H200")
    assert "### 2026-12-03" not in text and "- [2026-12-03](results/2026-12-03.json): NVIDIA H200." in text
    assert text.count("`bench gemm` (two,") == text.count("`bench gemm` (one,") == 1  # of each step the newest
    assert "`NVIDIA H200, 1980 MHz`" in text and "at 0123456789ab; torch 2.11, triton 3.6.0, cuda 13.0" in text
    assert "| fprop M 4096 | bf16 | 2.000 ms | 1.00 (1.00 ... 1.00) | 500 TFLOP/s |" in text
    assert "| fprop M 4096 | triton, WRONG | 1.000 ms | 0.50 (0.48 ... 0.53) | 1000 TFLOP/s |" in text
    assert "| quantize both | triton | 1.000 ms | 0.50 (0.48 ... 0.53) | 3000 GB/s |" in text
    assert "| training step | triton | 1.000 ms | 0.50 (0.48 ... 0.53) | 8,192,000 tok/s |" in text


def test_many_contestants_are_columns(tmp_path: Path) -> None:
    environment = dict.fromkeys(("torch", "triton", "cuda", "python", "git_commit", "git_dirty"), "1")
    timings = {name: {"median_seconds": 0.001 * number} for number, name in enumerate("abcd", 1)}
    results = [
        {"title": "one", "timings": timings, "flops": 1e12},
        {"title": "two", "timings": {"a": timings["a"]}, "flops": 2e12},
    ]
    bench = {"subject": "gemm", "arguments": {"rounds": 9}, "results": results}
    content = {"environment": environment | {"device": {"name": "NVIDIA H100"}}, "gemm": bench}
    (tmp_path / "2026-12-01.json").write_text(json.dumps(content))
    text = measured.section(tmp_path)
    assert "| TFLOP/s | a | b | c | d |" in text and "| one | 1000 | 500 | 333 | 250 |" in text
    assert "| two | 2000 | - | - | - |" in text


def test_what_was_made_by_hand_is_listed_with_its_note_only(tmp_path: Path) -> None:
    environment = dict.fromkeys(("torch", "triton", "cuda", "python", "git_commit", "git_dirty"), "1")
    bench = {"subject": "host", "arguments": {"rounds": 9}, "results": [{"title": "x", "extra_microseconds": 1.0}]}
    content = {"environment": environment | {"device": {"name": "NVIDIA H100"}}, "note": "So and so.", "host": bench}
    (tmp_path / "2026-12-01.json").write_text(json.dumps(content))
    text = measured.section(tmp_path)
    assert "bench host" not in text and text.count("So and so.") == 1 and "By hand at 1" in text
