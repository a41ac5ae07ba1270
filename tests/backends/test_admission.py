"""An entry of the launch table runs only where its check passed; a wrong, crashed or endless one is refused by name."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends import admission, get_backend  # noqa: E402
from fp8train.backends.admission import Admission, check  # noqa: E402
from fp8train.backends.triton import TritonBackend, kernel  # noqa: E402
from fp8train.errors import BackendError  # noqa: E402
from tests.hardware import devices  # noqa: E402
from tests.kernels.products import quantized  # noqa: E402

CPU = torch.device("cpu")
SMALL = ((1, 128, 128), (130, 140, 272))
operations = pytest.mark.parametrize("operation", ["gemm", "gemm_wgrad"])


@operations
@pytest.mark.parametrize("device", devices())
def test_the_kernels_pass_their_own_check(operation: str, device: str) -> None:
    assert check(operation, "ws_128x128_s4", torch.device(device), SMALL) is None


def wrong_scale(y: Tensor) -> Tensor:
    return y.mul_(1.001)


def one_bad_row(y: Tensor) -> Tensor:
    y[-1, -1] += 2 * y[-1].abs().max()
    return y


def unwritten(y: Tensor) -> Tensor:
    y[0, 0] = float("nan")
    return y


@operations
@pytest.mark.parametrize("spoil", [wrong_scale, one_bad_row, unwritten])
def test_a_wrong_product_is_refused(
    operation: str, spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kernel(operation)
    launch = getattr(module, operation)
    monkeypatch.setattr(module, operation, lambda *args, **kwargs: spoil(launch(*args, **kwargs)))
    assert "calc_diff" in str(check(operation, "tma_128x128_s4", CPU, SMALL[1:]))


def test_an_entry_that_cannot_read_its_operands_is_refused() -> None:
    assert "reads by TMA" in str(check("gemm", "ws_128x128_s4", CPU, ((5, 5, 33),)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with one GPU, as far as the verdicts look at it; its cache folder."""
    monkeypatch.setattr(admission, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(admission, "_fingerprint", lambda operation, index: f"{operation}-of-this-machine")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tmp_path


def child(status: int, said: str) -> Callable[..., Any]:
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        calls.append(command[3:])
        return SimpleNamespace(returncode=status, stdout=said, stderr=said)

    run.calls = calls  # type: ignore[attr-defined]
    return run


def test_a_verdict_is_kept_for_the_next_process(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = child(0, "correct")
    monkeypatch.setattr(subprocess, "run", run)
    device = torch.device("cuda", 0)
    for _ in range(3):
        assert Admission().admits("gemm", "ws_128x128_s4", device)
    assert run.calls == [["gemm", "ws_128x128_s4", "0"]]  # type: ignore[attr-defined]
    assert json.loads((machine / "kernels_gemm-of-this-machine.json").read_text()) == {"ws_128x128_s4": None}


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (admission.WRONG, "its product has calc_diff 2.0e-01", "its product has calc_diff 2.0e-01"),
        (-11, "first\nSegmentation fault", "its check ended with status -11: Segmentation fault"),
    ],
)
def test_a_refusal_is_kept_logged_and_reported(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    said: str,
    reason: str,
) -> None:
    monkeypatch.setattr(subprocess, "run", child(status, said))
    verdicts = Admission()
    assert not verdicts.admits("gemm", "ws_128x128_s4", torch.device("cuda", 0))
    assert verdicts.refused == [f"gemm ws_128x128_s4: {reason}"]
    assert [record.getMessage() for record in caplog.records] == [
        f"kernels: gemm entry ws_128x128_s4 refused on NVIDIA Test GPU: {reason}; the next entry is used"
    ]
    monkeypatch.setattr(subprocess, "run", child(0, "correct"))
    assert not Admission().admits("gemm", "ws_128x128_s4", torch.device("cuda", 0))


def test_a_check_that_does_not_end_refuses_the_entry(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **options: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    verdicts = Admission()
    assert not verdicts.admits("gemm_wgrad", "ws_128x128_s3", torch.device("cuda", 0))
    assert "did not end in 180 seconds" in verdicts.refused[0]


def test_an_undecided_check_is_made_again_by_the_next_process(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(subprocess, "run", child(admission.UNDECIDED, "CUDA out of memory"))
    assert not Admission().admits("gemm", "ws_128x128_s4", device)
    monkeypatch.setattr(subprocess, "run", child(0, "correct"))
    assert Admission().admits("gemm", "ws_128x128_s4", device)


def test_no_check_is_made_while_a_graph_is_captured(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a child was started"))
    assert not Admission().admits("gemm", "ws_128x128_s4", torch.device("cuda", 0))


def test_the_backend_takes_the_next_entry_and_says_which_were_refused(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def verdict(operation: str, entry: str, index: int) -> str | None:
        asked.append(entry)
        return "it hung" if entry.startswith("ws") else None

    monkeypatch.setattr(admission, "_verdict", verdict)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("fp8train.backends.triton._table_entries", lambda *shape: ("ws_128x128_s4", "tma_64x128_s4"))
    backend = TritonBackend()
    a, b = quantized(64, 128, "e4m3 1x128", 1), quantized(64, 128, "e4m3 128x128", 2)
    assert backend._entry("gemm", a, b) == "tma_64x128_s4" and backend._entry("gemm", a, b) == "tma_64x128_s4"
    assert asked == ["ws_128x128_s4", "tma_64x128_s4"]
    assert backend.note == "own FP8 kernels; refused on this machine: gemm ws_128x128_s4: it hung"
    a, b = quantized(64, 33, "e4m3 1x128", 1), quantized(64, 33, "e4m3 128x128", 2)
    assert backend._entry("gemm", a, b) is None and len(asked) == 2


def test_a_backend_of_one_entry_takes_it_or_says_why_not(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {"ws_128x128_s5": None, "ws_128x128_s3": "it hung"}
    monkeypatch.setattr(admission, "_verdict", lambda operation, entry, index: verdicts[entry])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    a, b = quantized(64, 128, "e4m3 1x128", 1), quantized(64, 128, "e4m3 128x128", 2)
    chosen = get_backend("triton:ws_128x128_s5")
    assert isinstance(chosen, TritonBackend) and chosen.note == "own FP8 kernels, GEMMs by ws_128x128_s5 only"
    assert chosen._entry("gemm", a, b) == "ws_128x128_s5"
    with pytest.raises(BackendError, match="backend: triton:ws_128x128_s3: gemm ws_128x128_s3: it hung"):
        TritonBackend("ws_128x128_s3")._entry("gemm", a, b)
    with pytest.raises(BackendError, match="backend: triton:ws_1x1: config is 'ws_1x1'; needs one of pointer"):
        TritonBackend("ws_1x1")._entry("gemm", a, b)


def test_table_lists_entries_that_exist_and_serves_each_class_of_shapes() -> None:
    table = kernel("gemm_table")
    for (operation, _), classes in table.TABLE.items():
        assert set(classes) == {
            table.shape_class(*shape, 132) for shape in ((1, 4096, 4096), (4096, 4096, 512), (4096,) * 3)
        }
        for entries in classes.values():
            assert set(entries) <= set(kernel(operation).CONFIGS)
    assert table.entries("gemm", (9, 0), 4096, 4096, 4096, 132)[0] == "ws_128x128_s4"
    assert table.entries("gemm", (8, 9), 4096, 4096, 4096, 132) == ()
    assert table.device_entries("gemm", CPU, 4096, 4096, 4096) == ()
