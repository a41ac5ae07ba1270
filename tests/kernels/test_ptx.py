"""The PTX of the kernels for sm_90, GEMMs left out, executed without a GPU: right bits, no race, no stray access."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from tests.kernels import ptx_run, sm90  # noqa: E402

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
