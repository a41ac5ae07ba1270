"""An entry of the launch table runs only where its check passed; a wrong, crashed or endless one is refused by name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends import admission, check_process  # noqa: E402
from fp8train.backends.admission import Admission  # noqa: E402
from fp8train.backends.admission_checks import (  # noqa: E402
    OTHER_DTYPES,
    QUANTISERS,
    ROTATIONS,
    STANDBY,
    STREAM,
    TRANSPOSES,
)
from fp8train.backends.kernel_codes import kernel  # noqa: E402
from fp8train.backends.user_cache import cache_folder  # noqa: E402
from fp8train.quant.formats import BF16, BLOCKWISE  # noqa: E402
from tests.nn.precisions import PRECISIONS  # noqa: E402
from tests.source_tree import ROOT  # noqa: E402

CPU = torch.device("cpu")


def child(status: int, said: str) -> Callable[..., Any]:
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        calls.append(command[command.index("fp8train.backends") + 1 :])
        return SimpleNamespace(returncode=status, stdout=said, stderr=said)

    run.calls = calls  # type: ignore[attr-defined]
    return run


def test_a_verdict_is_kept_for_the_next_process(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = child(0, "correct")
    monkeypatch.setattr(subprocess, "run", run)
    device = torch.device("cuda", 0)
    for _ in range(3):
        assert Admission().admits("gemm", "ws_128x128_s4", device)
    assert run.calls == [["gemm", "ws_128x128_s4", "--device", "0"]]  # type: ignore[attr-defined]
    assert json.loads((machine / "kernels_of-this-machine.json").read_text()) == {"gemm ws_128x128_s4": None}


@pytest.mark.parametrize(
    "content", ['{\n "gemm ws_128x128_s4": nu', "", "[]", '{"gemm ws_128x128_s4": 1}', "\udcff"], ids=ascii
)
def test_a_file_that_is_no_whole_one_is_written_anew(
    content: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = machine / "kernels_of-this-machine.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(subprocess, "run", child(0, "correct"))
    assert Admission().admits("gemm", "ws_128x128_s4", torch.device("cuda", 0))
    assert json.loads(path.read_text()) == {"gemm ws_128x128_s4": None}


def test_a_process_that_is_killed_while_it_writes_leaves_the_verdicts_of_before(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = machine / "kernels_of-this-machine.json"
    path.write_text('{"gemm a": "it hung"}')

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fp8train.whole_file.os.fsync", killed)
    monkeypatch.setattr(subprocess, "run", child(0, "correct"))
    with pytest.raises(KeyboardInterrupt):
        Admission().admits("gemm", "ws_128x128_s4", torch.device("cuda", 0))
    assert json.loads(path.read_text()) == {"gemm a": "it hung"}


def test_all_that_a_machine_uses_is_checked_at_once_and_one_line_says_so(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = [("gemm", "a"), ("gemm_wgrad", "a"), ("quantize", "dual")]
    monkeypatch.setattr(admission, "_used", lambda index: used)
    gate, names = threading.Barrier(3, timeout=20), []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        gate.wait()  # passes only if the three run side by side
        names.append(tuple(command[-4:-2]))
        return SimpleNamespace(returncode=0, stdout="correct", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    caplog.set_level("INFO", logger="fp8train")
    verdicts = Admission()
    assert all(verdicts.admits(*kernel, torch.device("cuda", 0)) for kernel in used)
    assert sorted(names) == sorted(used)
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: checked on NVIDIA Test GPU and correct: gemm a, gemm_wgrad a, quantize dual"
    ]


def test_what_may_hang_is_checked_first_and_verdicts_are_kept_as_they_come(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = [("gemm_wgrad", "gluon_a"), ("gemm", "ws_a")], ("quantize", "dual")
    used = [("gemm", "pointer"), ("quantize", "rows"), *first, last]
    monkeypatch.setattr(admission, "_used", lambda index: used)
    monkeypatch.setattr(admission, "AT_ONCE", 2)
    begun, kept, third, over = set(), threading.Event(), threading.Event(), threading.Event()
    write, shutdown = admission.write_whole, admission.ThreadPoolExecutor.shutdown
    monkeypatch.setattr(admission, "write_whole", lambda *file: (write(*file), kept.set()))
    monkeypatch.setattr(admission.ThreadPoolExecutor, "shutdown", lambda pool, wait: (over.set(), shutdown(pool, wait)))

    def run(command: list[str], **options: object) -> SimpleNamespace:
        begun.add(kernel := tuple(command[-4:-2]))
        if kernel == first[1]:
            assert kept.wait(60) and third.wait(60)
            raise KeyboardInterrupt  # whoever started all this loses patience
        if kernel != first[0]:
            third.set()
            assert over.wait(60)  # what has begun goes on
        return SimpleNamespace(returncode=0, stdout="correct", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        Admission().admits("gemm", "pointer", torch.device("cuda", 0))
    assert last not in begun  # nothing begins after the next, which may have begun
    settled = {" ".join(kernel): None for kernel in begun - {first[1]}}
    assert json.loads((machine / "kernels_of-this-machine.json").read_text()) == settled and len(settled) >= 2


def test_the_norm_that_a_bf16_model_has_is_checked_ahead() -> None:
    assert ("rmsnorm_quantize", "fp32") in QUANTISERS  # it reads the residual stream
    assert {name for _, name in OTHER_DTYPES} == {"bf16", "fp32"} and ("rope", "fp32") in OTHER_DTYPES


def test_without_a_home_a_process_makes_each_check_once(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(admission, "cache_folder", cache_folder)
    monkeypatch.setattr(Path, "home", lambda: Path("/proc/nowhere"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run := child(0, "correct"))
    for asked in (("gemm", "ws_128x128_s4"), ("rmsnorm_quantize", "fp32")):
        assert Admission().admits(*asked, torch.device("cuda", 0))
    assert [call[:2] for call in run.calls] == [["gemm", "ws_128x128_s4"], ["rmsnorm_quantize", "fp32"]]  # type: ignore[attr-defined]


def test_a_run_in_bf16_waits_for_no_other_kernel_than_its_own(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = child(0, "correct")
    monkeypatch.setattr(subprocess, "run", run)
    verdicts = Admission()
    assert verdicts.admits(*ROTATIONS[0], torch.device("cuda", 0))
    assert run.calls == [[*ROTATIONS[0], "--device", "0"]]  # type: ignore[attr-defined]
    assert verdicts.admits("gemm", "ws_128x128_s4", torch.device("cuda", 0)) and len(run.calls) == 2  # type: ignore[attr-defined]


def test_on_a_cpu_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a child was started"))
    assert Admission().admits("gemm", "ws_128x128_s4", CPU)


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (check_process.WRONG, "its product has calc_diff 2.0e-01", "its product has calc_diff 2.0e-01"),
        (check_process.FAILED, "PTXASError: no", "its check ended with an error: PTXASError: no"),
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
        f"kernels: gemm ws_128x128_s4 refused on NVIDIA Test GPU: {reason}; another takes its place"
    ]
    monkeypatch.setattr(subprocess, "run", child(0, "correct"))
    assert not Admission().admits("gemm", "ws_128x128_s4", torch.device("cuda", 0))
    assert admission.verdicts(0, again=True) == {("gemm", "ws_128x128_s4"): None}
    assert Admission().admits("gemm", "ws_128x128_s4", torch.device("cuda", 0))


def test_a_check_that_does_not_end_refuses_the_entry(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **options: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    verdicts = Admission()
    assert not verdicts.admits("gemm_wgrad", "tma_128x128_s4", torch.device("cuda", 0))
    assert len(verdicts.refused) == 2
    assert all("did not end in 180 seconds" in reason and "--again" in reason for reason in verdicts.refused)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (check_process.UNDECIDED, "CUDA out of memory"),
        (check_process.NO_GPU, "torch finds no CUDA GPU"),
        (1, "ModuleNotFoundError: No module named 'fp8train'"),
        (-signal.SIGKILL, "another process ended the check by signal 9"),
    ],
    ids=["memory", "no GPU", "import", "killed"],
)
def test_an_undecided_check_is_made_again_by_the_next_process_alone(
    status: int, said: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, verdicts = torch.device("cuda", 0), Admission()
    monkeypatch.setattr(subprocess, "run", child(status, said))
    assert not verdicts.admits("gemm", "ws_128x128_s4", device)
    assert verdicts.refused == [f"gemm ws_128x128_s4: it could not be checked: {said}"]
    right = child(0, "correct")
    monkeypatch.setattr(subprocess, "run", right)
    assert verdicts.admits("quantize", "rows", device) and not verdicts.admits("gemm", "ws_128x128_s4", device)
    assert right.calls == [["quantize", "rows", "--device", "0"]]  # type: ignore[attr-defined]
    assert Admission().admits("gemm", "ws_128x128_s4", device)


def test_a_process_that_cannot_be_started_decides_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(command: list[str], **options: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", full)
    verdicts = Admission()
    assert not verdicts.admits("gemm", "ws_128x128_s4", torch.device("cuda", 0))
    assert "it could not be checked: no process could be started: Resource temp" in verdicts.refused[0]
    assert not list(machine.glob("*.json"))


def test_no_check_is_made_while_a_graph_is_captured(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a child was started"))
    assert not Admission().admits("gemm", "ws_128x128_s4", torch.device("cuda", 0))


@pytest.mark.parametrize("operation", ["gemm", "gemm_wgrad"])
def test_table_orders_entries_by_the_waves_of_their_tiles(operation: str) -> None:
    table = kernel("gemm_table")
    for (name, _), rows in table.TABLE.items():
        for entry, (height, width, rate) in rows.items():
            assert f"_{height}x{width}_" in entry and entry in kernel(name).CONFIGS and rate > 0
    rates = table.table_rates(operation, (9, 0))
    many = table.ordered(rates, 8192, 8192, 132)
    assert many[0].startswith("gluon_192x128") and set(many) == set(table.TABLE[operation, 9])
    assert table.ordered(rates, 4096, 512, 132)[0] == "gluon_128x128_k2_s6", "128 tiles, and 88 of 192 rows"
    fprop = table.table_rates("gemm", (9, 0))
    assert table.ordered(fprop, 64, 4096, 132)[0] == "tma_64x128_s4", "others would pad half of their rows"
    assert table.table_rates(operation, (8, 9)) == {}
    assert table.device_entries(operation, CPU, 4096, 4096) == ()


@pytest.mark.parametrize("capability", [(9, 0), (8, 9)])
def test_the_command_checks_entries_too_that_no_table_has(
    capability: tuple[int, int], machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_process, "no_gpu", lambda device_type: None)
    monkeypatch.setattr("fp8train.backends.launch_rates.measured", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(subprocess, "run", child(0, "correct"))
    assert admission.main([]) == 0
    assert capsys.readouterr().out.splitlines() == ["gemm ws_128x128_s4: correct"]
    assert admission.main(["--all"]) == 0
    checked = {line.removesuffix(": correct") for line in capsys.readouterr().out.splitlines()}
    every = {f"{operation} {entry}" for operation in ("gemm", "gemm_wgrad") for entry in kernel(operation).CONFIGS}
    seldom = {f"{operation} {variant}" for operation, variant in (*STANDBY, *TRANSPOSES, *OTHER_DTYPES)}
    assert checked == seldom | (every if capability == (9, 0) else {"gemm ws_128x128_s4"})
    path = machine / "kernels_of-this-machine.json"
    path.write_text(json.dumps({"gemm a": "it hung", "gemm ws_128x128_s4": "it hung"}))
    for arguments, status, said in (([], check_process.WRONG, "it hung"), (["--again"], 0, "correct")):
        assert admission.main(arguments) == status
        assert f"gemm ws_128x128_s4: {said}" in capsys.readouterr().out.splitlines()
    assert json.loads(path.read_text()) == {"gemm ws_128x128_s4": None}


def test_forms_of_a_recipe_are_checked_with_the_usual_ones(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [("gemm", "a"), ("gemm_wgrad", "a"), ("quantize", "dual"), ("quantize_weight", "one_read"), *STREAM]
    monkeypatch.setattr(admission, "_used", lambda index: used)
    monkeypatch.setattr(subprocess, "run", run := child(0, "correct"))
    verdicts = Admission()
    verdicts.expect([BF16, BLOCKWISE, PRECISIONS["gradients-in-e5m2"]])
    assert run.calls == []  # type: ignore[attr-defined]
    assert verdicts.admits("quantize", "dual", torch.device("cuda", 0))
    e5m2 = "e5m2 1x128 pow2"
    wanted = {*used, ("gemm", "a e5m2 x e4m3"), ("gemm_wgrad", "a e5m2 x e4m3"), ("quantize", f"dual {e5m2}, {e5m2}")}
    assert {tuple(call[:2]) for call in run.calls} == wanted and len(run.calls) == len(wanted)  # type: ignore[attr-defined]
    assert all(verdicts.admits(*kernel, torch.device("cuda", 0)) for kernel in wanted) and len(run.calls) == len(wanted)  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_says_in_one_line_that_there_is_no_gpu() -> None:
    done = subprocess.run([sys.executable, "-m", "fp8train.backends"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == check_process.NO_GPU and len(done.stderr.splitlines()) == 1
    assert "needs a GPU with FP8 units" in done.stderr


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_all_that_the_backend_uses_is_checked_together(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    used = admission._used(0)
    assert {*QUANTISERS, *STREAM, *ROTATIONS} <= set(used) and len(used) == len(set(used))
    for operation in ("gemm", "gemm_wgrad"):
        entries = {entry for name, entry in used if name == operation}
        table = kernel("gemm_table").table_rates(operation, capability)
        assert entries == {*table, *kernel(operation).PLAIN[1 if capability < (9, 0) else 0 :]}
