"""The kernels' machine code for sm_90, compiled without a GPU: tensor cores, promotion, no spills; as README says."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.kernels import gemm, gemm_table, gemm_wgrad  # noqa: E402
from tests.kernels import sm90  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> list[sm90.Figures]:
    """Figures of all cases."""
    done = sm90.in_compiling_process("tests.kernels.sm90", "--json")
    assert done.returncode == 0, done.stderr
    return [sm90.Figures(**row) for row in json.loads(done.stdout)]


def test_nothing_spills_flushes_serialises_or_lacks_a_barrier_and_every_sum_is_promoted(
    rows: list[sm90.Figures],
) -> None:
    assert [f"{row.name}: {fault}" for row in rows for fault in row.faults()] == []


def test_every_entry_of_the_launch_table_is_compiled(rows: list[sm90.Figures]) -> None:
    names = {tuple(row.name.split()[:2]) for row in rows}
    for operation, module in (("gemm", gemm), ("gemm_wgrad", gemm_wgrad)):
        assert {(operation, entry) for entry in module.CONFIGS} <= names
    for operation, major in gemm_table.TABLE:
        assert set(gemm_table.listed((major, 0))) <= names, operation


def test_specialised_entries_have_their_own_math_warps(rows: list[sm90.Figures]) -> None:
    specialised = [row for row in rows if row.name.split()[1].startswith("ws_")]
    assert specialised and all(row.math_registers >= 200 for row in specialised)
    by_hand = {row.name.split()[1]: row.math_registers for row in rows if row.name.split()[1].startswith("gluon_")}
    assert by_hand == {
        "gluon_256x128_s4": 232, "gluon_192x128_s4": 160, "gluon_192x128_ahead_s5": 160,
        "gluon_128x128_k2_s6": 232, "gluon_64x256_k2_s5": 232, "gluon_64x256_ahead_s5": 232,
    }  # fmt: skip


def test_readme_gives_these_figures(rows: list[sm90.Figures]) -> None:
    import triton

    if f"Triton {triton.__version__}," not in sm90.table_in_readme():
        pytest.skip(f"the table was made with another Triton than {triton.__version__}")
    assert sm90.table_in_readme() == sm90.table(rows), "run python -m tests.kernels.sm90 --write"


def test_plain_gemms_compile_for_ada_and_blackwell() -> None:
    done = sm90.in_compiling_process("tests.kernels.sm90", "--others")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_spill_a_missing_promotion_and_a_flush_are_faults() -> None:
    good = sm90.Figures("gemm x", 168, 232, 0, 1024, 4, 64, 130, 70, 64, False, [], [])
    assert good.faults() == []
    bad = sm90.Figures("gemm x", 255, 0, 8, 1024, 0, 0, 130, 70, 64, True, ["C7510 wgmma serialized"], ["lost barrier"])
    assert [fault.split()[0] for fault in bad.faults()] == ["8", "flushes", "assembler:", "lost", "0", "0"]
