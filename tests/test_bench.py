"""`fp8train bench`: interleaving, ratios, checks before timing, and what the commands print."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8train import bench
from fp8train.benchmarks import gemm, host, quantize, timing
from fp8train.benchmarks.linear import saved_bytes
from fp8train.benchmarks.timing import BenchArguments, interleaved
from fp8train.errors import ConfigError, exit_code
from fp8train.nn.linear import Float8Linear
from tests.source_tree import ROOT

CPU = torch.device("cpu")


def test_contestants_take_turns_and_warm_up_does_not_count() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    timings = interleaved(calls, BenchArguments(rounds=2, warmup=1), CPU)
    assert order == ["a", "b", "c"] * 3
    assert list(timings) == ["a", "b", "c"]


def test_ratio_is_the_median_of_the_rounds_own_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 2.0, 10.0, 30.0, 1.0, 4.0])  # a, b in three rounds: ratios 2, 3, 4
    monkeypatch.setattr("fp8train.benchmarks.timing._cpu_clock", lambda call: next(seconds))
    timing = interleaved({"a": int, "b": int}, BenchArguments(rounds=3, warmup=0), CPU)["b"]
    assert (timing.ratio_low, timing.ratio, timing.ratio_high) == (2.5, 3.0, 3.5)
    assert (timing.min_seconds, timing.median_seconds, timing.max_seconds) == (2.0, 4.0, 30.0)


def test_saved_bytes_count_a_storage_once_and_no_weight() -> None:
    linear, sibling = (Float8Linear(256, 128, bias=False) for _ in range(2))
    sibling.inputs = linear.inputs
    x = torch.randn(128, 256, dtype=torch.bfloat16)
    one = saved_bytes(linear, lambda: linear(x))
    assert one == 128 * 256 + 4 * 256  # one byte an element, and a scale for each channel's 128 tokens
    both = torch.nn.ModuleList([linear, sibling])
    assert saved_bytes(both, lambda: linear(x) + sibling(x)) == one


def test_gemm_bench_times_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gemm.json"
    arguments = ["rows=[130]", "shapes=[[100,200]]", "rounds=2", "warmup=0", f"out={out}"]
    assert exit_code(bench.main, ["gemm", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "fprop M 130, N 100, K 200" in printed and "triton: not timed" in printed
    results = json.loads(out.read_text())["results"]
    assert [result["gemm"] for result in results] == ["fprop", "dgrad", "wgrad"]
    assert all(set(result["timings"]) == {"bf16", "cpu"} and not result["wrong"] for result in results)


def test_gemm_that_adds_keeps_adding_to_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Watched(gemm.get_backend("cpu").__class__):  # type: ignore[misc]
        def scaled_mm(self, a, b, bias, out, accumulate, out_dtype):  # type: ignore[no-untyped-def]
            given.append((a.shape, accumulate, None if out is None else (id(out), out.dtype)))
            return super().scaled_mm(a, b, bias, out, accumulate, out_dtype)

    monkeypatch.setattr(gemm, "get_backend", lambda name: Watched())
    arguments = ["gemm", "rows=[64]", "shapes=[[48,32]]", "backends=[cpu]", "rounds=2", "warmup=0", "accumulate=true"]
    assert exit_code(bench.main, arguments) == 0
    wgrads = [call for call in given if call[0] == (48, 64)]
    assert len(wgrads) == 3 and len({call[2] for call in wgrads}) == 1, "checked once, timed twice"
    assert all(adds and out[1] is torch.float32 for _, adds, out in wgrads)
    assert not any(adds for shape, adds, _ in given if shape != (48, 64))


def test_gemm_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong(gemm.get_backend("cpu").__class__):  # type: ignore[misc]
        def scaled_mm(self, *args):  # type: ignore[no-untyped-def]
            result = super().scaled_mm(*args)
            result[0, 0] += 1e3
            return result

    monkeypatch.setattr(gemm, "get_backend", lambda name: Wrong())
    arguments = ["gemm", "rows=[64]", "shapes=[[64,64]]", "backends=[cpu]", "gemms=[wgrad]", "rounds=1"]
    assert exit_code(bench.main, arguments) == 1
    assert "NOT TIMED" in capsys.readouterr().out


def test_gemm_that_fails_is_not_timed_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(gemm.get_backend("cpu").__class__):  # type: ignore[misc]
        def scaled_mm(self, *args):  # type: ignore[no-untyped-def]
            raise OSError("libvendor.so: no such symbol\nand a traceback")

    real = gemm.get_backend
    monkeypatch.setattr(gemm, "get_backend", lambda name: Broken() if name == "cpu" else real(name))
    arguments = ["gemm", "rows=[64]", "shapes=[[64,64]]", "backends=[cpu,reference]", "gemms=[fprop]", "rounds=1"]
    assert exit_code(bench.main, arguments) == 1
    said = capsys.readouterr().out
    assert "cpu            NOT TIMED: OSError: libvendor.so: no such symbol\n" in said
    assert "reference" in said.split("fprop M 64, N 64, K 64")[1].split("NOT TIMED")[0]


def test_nan_counts_as_total_disagreement() -> None:
    ones = torch.ones(2, 2)
    assert gemm.calc_diff(ones, ones) == 0.0
    assert gemm.calc_diff(ones * float("nan"), ones) == 1.0


def test_quantize_bench_checks_every_result(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["quantize", "shapes=[[300,260]]", "rounds=1", "warmup=0"]
    assert exit_code(bench.main, arguments) == 0

    class OffByOne(quantize.get_backend("cpu").__class__):  # type: ignore[misc]
        def quantize_dual(self, *args):  # type: ignore[no-untyped-def]
            q, qt = super().quantize_dual(*args)
            qt.qdata.view(torch.uint8)[3, 5] ^= 1
            return q, qt

        def rms_norm_backward(self, *args):  # type: ignore[no-untyped-def]
            dx, dweight, branch = super().rms_norm_backward(*args)
            return dx, dweight * (1 + 1e-4), branch

        def rope(self, *args):  # type: ignore[no-untyped-def]
            return super().rope(*args).neg()

    monkeypatch.setattr(quantize, "get_backend", lambda name: OffByOne())
    assert exit_code(bench.main, [*arguments, "cases=[row]"]) == 0
    for case in ("both", "rmsnorm", "swiglu", "swiglu_backward", "rmsnorm_backward", "rope"):
        assert exit_code(bench.main, [*arguments, f"cases=[{case}]"]) == 1, case


def test_quantize_bench_times_triton_with_words_and_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
    from fp8train.backends.kernel_codes import kernel
    from fp8train.backends.triton import TritonBackend

    launch, module, words = kernel("quantize").launch, kernel("quantize"), list[bool]()
    monkeypatch.setattr(module, "launch", lambda *args: (words.append(args[-1]()[2]["WORDS"]), launch(*args)))
    monkeypatch.setattr(quantize, "get_backend", lambda name: TritonBackend())
    arguments = ["quantize", "shapes=[[128,128]]", "cases=[both]", "rounds=1", "warmup=0", "plain=true"]
    assert exit_code(bench.main, arguments) == 0
    said = capsys.readouterr().out
    assert "\nboth " in said and "\nboth, plain " in said and set(words) == {True, False}


def test_host_bench_counts_what_a_converted_linear_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "host.json"
    assert exit_code(bench.main, ["host", "rounds=9", "calls=20", f"out={out}"]) == 0
    facts = json.loads(out.read_text())["results"][0]
    each = facts["microseconds"]
    assert facts["extra_microseconds"] == each["blockwise"] - each["nn.Linear"]
    # two quantisers and three GEMMs allocate eight results more than nn.Linear does, whatever the machine; the shortest
    # round, because others may keep the machine busy
    least = {name: timing["min_seconds"] for name, timing in facts["timings"].items()}
    assert least["blockwise"] - least["nn.Linear"] > 4 * least["torch.empty"]
    assert ("us more than nn.Linear" in capsys.readouterr().out) == facts["measurable"]


def test_host_bench_has_one_thread_and_leaves_torch_its_own(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert exit_code(bench.main, ["host", "rounds=1", "calls=1", f"out={tmp_path / 'one'}"]) == 0
        assert exit_code(bench.main, ["host", "rounds=1", "calls=1", "threads=3", f"out={tmp_path / 'three'}"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert [json.loads((tmp_path / name).read_text())["threads"] for name in ("one", "three")] == [1, 3]


@pytest.mark.parametrize(
    ("linear", "converted", "said"),
    [
        ([1.0, 1.1, 1.0], [9.0, 10.0, 9.0], "us more than nn.Linear\n"),
        ([20.0, 25.0, 22.0], [1.0, 1.0, 1.0], "is not measurable here: it took 0.04 to 0.05 times nn.Linear's time\n"),
        ([1.0, 8.0, 1.0], [9.0, 9.0, 2.0], "is not measurable here: it took 1.56 to 5.50 times nn.Linear's time\n"),
    ],
    ids=["quiet", "faster", "busy"],
)
def test_host_bench_gives_no_figure_that_its_rounds_do_not_bear_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    linear: list[float],
    converted: list[float],
    said: str,
) -> None:
    taken = {"nn.Linear": linear, "blockwise": converted, "torch.empty": [1.0, 1.0, 1.0]}
    found = {name: timing._timing(values, linear) for name, values in taken.items()}
    monkeypatch.setattr(host, "interleaved", lambda calls, arguments, device: found)
    assert exit_code(bench.main, ["host"]) == 0
    assert capsys.readouterr().out.endswith(said)


def test_step_bench_times_a_training_step_of_both_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.num_layers=1", "model.hidden_size=64", "model.intermediate_size=64", "model.num_heads=1"]
    out = tmp_path / "step.json"
    small += ["model.num_kv_heads=1", "seq_len=32", "global_batch_tokens=64", "rounds=2", "warmup=0", f"out={out}"]
    assert exit_code(bench.main, ["step", *small]) == 0
    assert "tok/s" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert set(content["results"][0]["timings"]) == {"bf16", "blockwise"}
    assert content["results"][0]["config"]["model"]["hidden_size"] == 64 and "git_commit" in content["environment"]
    assert "kernels" not in content["results"][0]
    assert exit_code(bench.main, ["step", "baseline=unfused", "fused=always", "profile=true", *small]) == 0
    said = capsys.readouterr().out
    assert "; 3 of 3 norms and MLPs fused" in said  # the last contestant; the first has none
    found = json.loads(out.read_text())["results"][0]
    assert list(found["timings"]) == list(found["kernels"]) == ["unfused", "blockwise"]
    if not torch.cuda.is_available():  # a kernel's name there is not an operation's
        for arm, times in found["kernels"].items():
            calls = {time["name"]: time["calls"] for time in times}
            # of a layer: the head is in BF16
            assert calls["fp8train::scaled_mm"] == 7 * 3, arm
            seconds = [time["seconds"] for time in times]
            assert seconds == sorted(seconds, reverse=True) and f"{arm}: {1e3 * sum(seconds):.2f} ms in" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stepp"], "step"),
        (["step", "recipe=bf16"], "baseline"),
        (["step", "baseline=fp8"], "needs bf16 or unfused"),
        (["linear", "rounds=0"], "rounds >= 1"),
        (["linear", "recipe=bf16"], "no FP8 precision"),
        (["gemm", "gemms=[fwd]"], "fwd"),
        (["gemm", "shapes=[[1,2,3]]"], "[N, K]"),
        (["gemm", "backends=[triton]"], "triton cannot be used"),
        (["quantize", "cases=[rows]"], "rows"),
        (["quantize", "cases=[rope]", "shapes=[[8,33]]"], "even number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_timed_is_refused(argv: list[str], message: str) -> None:
    if argv[1:] == ["backends=[triton]"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        bench.main(argv)


def test_benches_with_one_lock_take_turns(tmp_path: Path) -> None:
    """Two that start together: the second begins to compute when the first has written its figures."""
    lock, ends = tmp_path / "lock", []
    command = [sys.executable, "-m", "fp8train.bench", "host", "calls=2", "rounds=1", f"lock={lock}"]
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = [subprocess.Popen([*command, f"out={tmp_path / name}"], cwd=ROOT) for name in ("a", "b")]
        with pytest.raises(subprocess.TimeoutExpired):
            waiting[0].wait(timeout=15)
        ends += [process.poll() for process in waiting]
    assert ends == [None, None], "both wait"
    assert [process.wait(timeout=120) for process in waiting] == [0, 0]
    assert (tmp_path / "a").is_file() and (tmp_path / "b").is_file()


def test_a_bench_that_takes_too_long_is_ended() -> None:
    command = [sys.executable, "-m", "fp8train.bench", "host", "calls=1000000", "limit_seconds=1"]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGALRM


@pytest.mark.parametrize(
    ("argument", "message"), [("limit_seconds=0", "needs at least 1"), ("lock=/nowhere/lock", "cannot be opened")]
)
def test_a_turn_that_cannot_be_had_is_refused(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.main(["host", argument])


def test_a_file_that_serves_as_lock_keeps_what_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("mine")
    assert bench.main(["host", "calls=1", "rounds=1", "warmup=0", f"lock={file}"]) == 0
    assert file.read_text() == "mine"
