"""The table of targets says what the files say: the newest of an H200, the worst case, and a limit that counts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels import targets

SHAPE = {"M": 8192, "N": 4096, "K": 7168}


def timing(seconds: float, ratio: float = 1.0) -> dict[str, float]:
    return {"median_seconds": seconds, "ratio": ratio}


def content(device: str = "NVIDIA H200", **benches: Any) -> dict[str, Any]:
    return {"environment": {"device": {"name": device}}, "machine": "text", **benches}


def bench(subject: str, *results: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return {"subject": subject, "arguments": arguments, "results": list(results)}


def product(name: str, flops: float, **seconds: float) -> dict[str, Any]:
    timings = {contestant.replace("__", ":"): timing(value) for contestant, value in seconds.items()}
    return {"title": f"{name} {flops:g}", "gemm": name, "flops": flops, "timings": timings, **SHAPE}


def line(files: list[tuple[str, dict[str, Any]]], wanted: str) -> list[str]:
    """Cells of the row whose first one begins so, after that one."""
    rows = [row.strip("| ").split(" | ") for row in targets.table(files)]
    (row,) = [row for row in rows if row[0].startswith(wanted)]
    return row[1:]


def test_without_files_nothing_is_reached() -> None:
    assert all("| - | not measured yet | -" in row for row in targets.table([])[2:])
    assert len(targets.table([])) > 10


def test_another_card_does_not_count() -> None:
    results = bench("host", {"title": "host", "extra_microseconds": 10.0})
    assert line([("a", content("NVIDIA H100 80GB HBM3", host=results))], "host")[0] == "-"
    assert line([("a", content(host=results))], "host") == ["1 of 1", "10.0 us, host", "a"]


def test_the_newest_file_that_has_the_bench_counts() -> None:
    old = content(host=bench("host", {"title": "host", "extra_microseconds": 99.0}))
    new = content(host=bench("host", {"title": "host", "extra_microseconds": 60.1}))
    assert line([("2", new), ("1", old)], "host") == ["0 of 1", "60.1 us, host", "2"]
    assert line([("3", content()), ("1", old)], "host") == ["0 of 1", "99.0 us, host", "1"]


def test_gemms_are_counted_against_cublaslt_and_by_rate() -> None:
    results = (
        product("fprop", 1e15, bf16=2.0, cublaslt=1.0, triton=1.0),
        product("dgrad", 2e15, bf16=4.0, cublaslt=1.0, triton=2.2),
        product("wgrad", 1e15, bf16=2.0, cublaslt=1.0, triton=1 / 0.86),
    )
    files = [("a", content(gemm=bench("gemm", *results, accumulate=False)))]
    assert line(files, "fprop, dgrad: at least") == ["1 of 2", "0.45x, dgrad 2e+15", "a"]
    assert line(files, "fprop, dgrad with N and K") == ["1 of 2", "0.91 PFLOP/s, dgrad 2e+15", "a"]
    assert line(files, "then 1.3") == ["0 of 2", "0.91 PFLOP/s, dgrad 2e+15", "a"]
    assert line(files, "wgrad") == ["1 of 1", "0.86 PFLOP/s, wgrad 1e+15", "a"]


def test_of_single_entries_the_table_s_pick_counts_and_adding_does_not() -> None:
    # 8192 x 4096: 43 x 32 tiles of 192x128 are 11 waves of 132, 32 x 32 of 256x128 are 8, which take less time
    entries = {"triton__gluon_192x128_s4": 1.0, "triton__gluon_256x128_s4": 2.0}
    files = [("a", content(each_gemm=bench("gemm", product("fprop", 1e15, bf16=3.0, cublaslt=1.0, **entries))))]
    assert line(files, "fprop, dgrad: at least")[1].startswith("0.50x")
    adding = content(adding=bench("gemm", product("wgrad", 1e15, bf16=1.0, triton=1.0), accumulate=True))
    assert line([("b", adding)], "wgrad")[0] == "-"


def test_small_shapes_need_no_petaflop() -> None:
    small = product("fprop", 1e15, bf16=2.0, cublaslt=1.0, triton=1.0) | {"N": 576}
    files = [("a", content(gemm=bench("gemm", small)))]
    assert line(files, "fprop, dgrad: at least")[0] == "1 of 1" and line(files, "fprop, dgrad with N")[0] == "-"


@pytest.mark.parametrize(
    ("wanted", "case", "enough"),
    [("quantisers", "weight", 0.85), ("with a norm", "swiglu", 0.85), ("both copies", "both", 1 / 1.15)],
)
def test_quantisers_by_their_share_of_a_copy(wanted: str, case: str, enough: float) -> None:
    for share, reached in ((enough, "1 of 1"), (enough - 1e-3, "0 of 1")):
        result = {"title": case, "case": case, "share_of_copy_bandwidth": share}
        found = line([("a", content(quantize=bench("quantize", result)))], wanted)
        assert found[0] == reached and found[1] == f"{100 * share:.1f} %, {case}"


def test_linears_by_size_and_steps_of_one_file() -> None:
    def arms(ratio: float, **facts: Any) -> dict[str, Any]:
        timings = {"bf16": timing(1.0), "blockwise": timing(ratio, ratio)}
        return {"title": "arms", "timings": timings, **facts}

    step = {"peak_bytes": {"bf16": 100, "blockwise": 91}}
    unfused = {"title": "x", "timings": {"unfused": timing(1.0), "blockwise": timing(0.1, 0.1)}, **step}
    new = content(
        linear_4096=bench("linear", arms(0.7, N=4096)), linear_8192=bench("linear", arms(0.7, N=8192)),
        step_eager=bench("step", arms(0.7, **step)),
        step_large=bench("step", arms(0.8, peak_bytes={"bf16": 100, "blockwise": 90})),
        step_fused=bench("step", unfused),
    )  # fmt: skip
    files = [("2", new), ("1", content(step_eager=bench("step", arms(0.1, **step))))]
    assert line(files, "linear 4096") == ["1 of 1", "1.43x, linear_4096", "2"]
    assert line(files, "linear 8192") == ["0 of 1", "1.43x, linear_8192", "2"]
    assert line(files, "step of four") == ["1 of 2", "1.25x, step_large", "2"]
    assert line(files, "its peak") == ["1 of 2", "0.91x, step_eager", "2"]
