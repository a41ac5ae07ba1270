"""The PTX of the kernels for sm_90, executed without a GPU: right numbers, no race, no stray access."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from tests.kernels import ptx_gemm, ptx_run, sm90  # noqa: E402

pytestmark = pytest.mark.slow


def test_kernels_compute_the_definition_without_a_fault() -> None:
    done = sm90.in_compiling_process("tests.kernels.ptx_run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right\n") == len(ptx_run.CASES)


def test_a_lost_barrier_and_an_altered_exchange_or_permutation_are_noticed() -> None:
    done = sm90.in_compiling_process("tests.kernels.ptx_run", "--altered")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [instruction for instruction in ptx_run.ALTERED if instruction not in done.stdout] == []
    assert "without a barrier" in done.stdout and "differ" in done.stdout


@pytest.mark.parametrize("operation", ["gemm", "gemm_wgrad"])
def test_every_entry_of_a_gemm_gives_the_product_without_a_fault(operation: str) -> None:
    done = sm90.in_compiling_process("tests.kernels.ptx_gemm", operation)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right\n") == sum(case.operation == operation for case in ptx_gemm.cases())


def test_what_a_gemm_needs_is_missed() -> None:
    done = sm90.in_compiling_process("tests.kernels.ptx_gemm", "--altered")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [instruction for _, instruction, *_ in ptx_gemm.ALTERED if f", {instruction} of" not in done.stdout] == []
    assert "may be on their way: shared memory: TMA writes" in done.stdout
