"""`fp8train bench entries`: what it needs, what it counts, and when it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train import bench  # noqa: E402
from fp8train.backends import launch_rates  # noqa: E402
from fp8train.backends.admission import Admission  # noqa: E402
from fp8train.backends.kernel_codes import kernel  # noqa: E402
from fp8train.benchmarks import entries  # noqa: E402
from fp8train.benchmarks.timing import BenchResult, Timing  # noqa: E402
from fp8train.distributed import World  # noqa: E402
from fp8train.errors import exit_code  # noqa: E402


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """One H100 on which every entry but one is right, and takes a millisecond for 8192 x 8192 x 8192."""
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, name="NVIDIA Test GPU"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test GPU")
    monkeypatch.setattr(launch_rates, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(launch_rates, "fingerprint", lambda index: "here")

    def admits(self: Admission, operation: str, entry: str, device: torch.device) -> bool:
        self._verdicts[operation, entry, 0] = "it hung" if entry == "tma_64x128_s4" else None
        return entry != "tma_64x128_s4"

    def timed(gemm: str, names: list[str], arguments: Any, device: torch.device) -> BenchResult:
        timing = Timing(
            median_seconds=1e-3, min_seconds=1e-3, max_seconds=1e-3, ratio=1.0, ratio_low=1.0, ratio_high=1.0
        )
        size = arguments.size
        facts = {"gemm": gemm, "M": size, "N": size, "K": size, "wrong": {}, "failed": {}}
        return BenchResult(title=gemm, timings=dict.fromkeys(["bf16", *names], timing), facts=facts)

    monkeypatch.setattr(Admission, "admits", admits)
    monkeypatch.setattr(entries, "_timed", timed)
    made = object.__new__(World)
    object.__setattr__(made, "device", torch.device("cuda", 0))
    return made


def test_rates_are_of_full_waves_and_are_written_when_asked(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entries.run([f"out={tmp_path / 'entries.json'}"], world) == 0
    said = capsys.readouterr().out
    assert "not timed: gemm tma_64x128_s4: it hung" in said and not (tmp_path / "rates_here.json").exists()
    rates = [result["full_waves"] for result in json.loads((tmp_path / "entries.json").read_text())["results"]]
    assert [set(found) for found in rates] == [
        set(kernel(operation).CONFIGS) - {"tma_64x128_s4"} for operation in ("gemm", "gemm_wgrad")
    ]
    # 43 rows of 64 tiles are 20.8 waves of 132 multiprocessors: 21 waves take the millisecond
    assert rates[0]["gluon_192x128_s4"] == round(2 * 21 * 132 * 192 * 128 * 8192 / 1e-3 / 1e12, 1)
    assert f"{'gluon_192x128_s4':26s} {rates[0]['gluon_192x128_s4']:6.0f} TFLOP/s    1307 TFLOP/s" in said
    assert entries.run(["write=true"], world) == 0
    assert "launch table of this machine from now on: " in capsys.readouterr().out
    launch_rates.measured.cache_clear()
    own = launch_rates.measured(0)
    launch_rates.measured.cache_clear()
    assert own is not None and {name: rate for name, (_, _, rate) in own.rates["gemm"].items()} == rates[0]


def test_nothing_is_written_where_an_entry_is_wrong(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = entries._timed

    def wrong(*arguments: Any) -> BenchResult:
        result = timed(*arguments)
        result.facts["wrong"] = {"gluon_192x128_s4": 0.5}
        return result

    monkeypatch.setattr(entries, "_timed", wrong)
    assert entries.run(["write=true"], world) == 1
    assert not (tmp_path / "rates_here.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("argument", "message"),
    [("write=true", "entries cannot be measured: there is no GPU"), ("size=100", "needs a multiple of 128")],
)
def test_what_it_cannot_do_it_says(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(bench.main, ["entries", argument]) == 2
    assert message in capsys.readouterr().err
