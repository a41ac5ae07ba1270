"""Rates measured on a machine stand in for the launch table there, and say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends import launch_rates, triton  # noqa: E402
from fp8train.backends.admission import Admission  # noqa: E402
from fp8train.backends.kernel_codes import kernel  # noqa: E402
from fp8train.backends.triton import TritonBackend  # noqa: E402
from fp8train.errors import BackendError  # noqa: E402
from tests.kernels.products import quantized  # noqa: E402

GPU = torch.device("cuda", 0)
RATES = {"gemm": {"gluon_192x128_s4": 900.0, "pointer_64x64_s3": 1000.0}, "gemm_wgrad": {"gluon_128x128_k2_s6": 1e3}}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with one H100, as far as the launch table looks at it; its cache folder."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="NVIDIA Test GPU")
    monkeypatch.setattr(launch_rates, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(launch_rates, "fingerprint", lambda index: f"of-gpu-{index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    launch_rates.measured.cache_clear()
    yield tmp_path
    launch_rates.measured.cache_clear()


def test_nothing_measured_leaves_the_table() -> None:
    assert launch_rates.measured(0) is None
    assert triton._table_entries("gemm", GPU, 8192, 8192)[0] == "gluon_192x128_s4"
    assert triton._table_entries("gemm", torch.device("cpu"), 8192, 8192) == ()


def test_rates_are_kept_for_the_gpu_that_they_are_of(machine: Path) -> None:
    path = launch_rates.write(1, RATES)
    assert path == machine / "rates_of-gpu-1.json" and list(machine.iterdir()) == [path], "nothing is left beside it"
    found = launch_rates.measured(1)
    assert found is not None and len(found.date) == 10 and launch_rates.measured(0) is None
    assert found.rates["gemm"] == {"gluon_192x128_s4": (192, 128, 900.0), "pointer_64x64_s3": (64, 64, 1000.0)}
    assert found.rates["gemm_wgrad"] == {"gluon_128x128_k2_s6": (128, 128, 1000.0)}


def test_entries_are_ordered_by_them_and_others_are_not_used() -> None:
    launch_rates.write(0, RATES)
    assert triton._table_entries("gemm", GPU, 8192, 8192) == ("pointer_64x64_s3", "gluon_192x128_s4")
    assert triton._table_entries("gemm_wgrad", GPU, 64, 64) == ("gluon_128x128_k2_s6",)


def test_the_backend_says_whose_table_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_rates.write(0, RATES)
    own = launch_rates.measured(0)
    assert own is not None
    monkeypatch.setattr(triton, "_measured", lambda device: own)
    monkeypatch.setattr(triton, "_table_entries", lambda *shape: ("tma_128x128_s4",))
    backend = TritonBackend()
    a, b = quantized(64, 128, "e4m3 1x128", 1), quantized(64, 128, "e4m3 128x128", 2)
    assert backend._entry("gemm", a, b) == "tma_128x128_s4"
    assert backend.note == f"own FP8 kernels; launch table measured on this machine, {own.date}"
    monkeypatch.setattr(Admission, "refused", ["gemm x: it hung"])
    backend._renew_note(GPU)
    assert backend.note.endswith(f"{own.date}; refused on this machine: gemm x: it hung")
    chosen = TritonBackend("tma_128x128_s4")
    chosen._renew_note(GPU)
    assert chosen.note == "own FP8 kernels, GEMMs by tma_128x128_s4 only; refused on this machine: gemm x: it hung"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"date": "2026-11-26", "rates": {"gemm": {}}}', '{"date": 1, "rates": {"gemm": {"x": 1}}}'],
    ids=["empty", "list", "nothing", "one-operation", "no-such-entry"],
)
def test_a_file_that_is_not_one_stops_with_its_name(machine: Path, text: str) -> None:
    (machine / "rates_of-gpu-0.json").write_text(text)
    with pytest.raises(BackendError, match=r"rates_of-gpu-0.json cannot be read .*Delete it, or measure again"):
        launch_rates.measured(0)


def test_tiles_are_those_of_the_names() -> None:
    for operation in ("gemm", "gemm_wgrad"):
        for name, entry in kernel(operation).CONFIGS.items():
            rows, cols = kernel("gemm_tile").tile_of(entry)
            assert f"_{rows}x{cols}_" in name
