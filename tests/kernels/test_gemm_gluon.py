"""The Gluon GEMMs: what they refuse, and that the model which runs them without a GPU sees the faults it is there for.

Their numbers are tested with those of every other entry, in test_gemm.py and test_gemm_wgrad.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends.product_checks import CROWD, SHAPES, check_crowd, check_product  # noqa: E402
from fp8train.kernels import gemm, gemm_gluon, gemm_gluon_sum, gemm_launch, gemm_wgrad  # noqa: E402
from tests.kernels import sm90  # noqa: E402
from tests.kernels.gluon_faults import EARLY_AHEAD, GIVE_BACK, faulty_modules  # noqa: E402
from tests.kernels.gluon_machine import Hazard  # noqa: E402
from tests.kernels.gluon_model import Kernel  # noqa: E402
from tests.kernels.products import DEVICE, assert_product, m_contiguous, quantized  # noqa: E402
from tests.shapes import matrix  # noqa: E402

ENTRIES = [
    (module, name) for module in (gemm, gemm_wgrad) for name, entry in module.CONFIGS.items() if "MATH_GROUPS" in entry
]
SEEN = (Hazard, AssertionError, AttributeError, TypeError, IndexError)
on_a_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="the model stands in for a GPU only where there is none")


def product(module: object, config: str) -> None:
    """Multiply, and add if the module adds; several tiles and more than a ring of slots to each program.

    Asserts that the result is right.
    """
    operation = "gemm" if module is gemm else "gemm_wgrad"
    a = quantized(300, 1104, "e4m3 1x128", 1)
    b = quantized(400, 1104, "e4m3 128x128" if module is gemm else "e4m3 1x128", 2)
    scale = b.scale_inv if module is gemm else m_contiguous(b.scale_inv)
    before = None if module is gemm else matrix(300, 400).to(DEVICE)
    options = {"out_dtype": torch.bfloat16} if before is None else {"out": before.clone(), "accumulate": True}
    y = getattr(module, operation)(a.qdata, b.qdata, a.scale_inv, scale, config=config, **options)
    assert_product(y, a, b, before)


@on_a_cpu
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("module", "config"), ENTRIES, ids=lambda x: getattr(x, "__name__", x))
def test_any_order_of_events_gives_the_product(
    module: object, config: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the fixture's model, which this one takes apart again
    monkeypatch.setattr(gemm_launch, "capability", lambda device: (9, 0))
    monkeypatch.setattr(gemm_gluon, "_gemm_gluon_kernel", Kernel(gemm_gluon_sum, gemm_gluon, seed=seed))
    product(module, config)


@pytest.mark.parametrize(("module", "config"), ENTRIES, ids=lambda x: getattr(x, "__name__", x))
def test_sums_are_those_of_the_plain_entry_bit_for_bit_where_programs_have_many_tiles(
    module: object, config: str
) -> None:
    sizes = CROWD if DEVICE == "cuda" else (300, 400, 400)  # a CPU stands for three multiprocessors
    operation = "gemm" if module is gemm else "gemm_wgrad"
    assert check_crowd(operation, config, torch.device(DEVICE), sizes, tries=20 if DEVICE == "cuda" else 1) is None


@pytest.mark.parametrize(("module", "config"), ENTRIES, ids=lambda x: getattr(x, "__name__", x))
def test_entries_pass_the_check_before_their_first_use(module: object, config: str) -> None:
    shapes = SHAPES if DEVICE == "cuda" else SHAPES[:2]  # the others take the model minutes
    assert check_product("gemm" if module is gemm else "gemm_wgrad", config, torch.device(DEVICE), shapes) is None


FAULTS = {  # what to change in the source of the kernel or in that of its loops
    "the producer waits for slots that nobody has used": ("    phase = 1  # of barriers", "    phase = 0  # of"),
    "a slot is free as soon as one warpgroup has read it": ("count=MATH_GROUPS", "count=1"),
    "the parity does not turn": ("        phase ^= 1", "        phase ^= 0"),
    "too few bytes are announced": ("* BLOCK_K + (0 if", "* BLOCK_K - 128 + (0 if"),
    "a product is used before it is there": ("_wait(0, deps=(partial,))", "_wait(1, deps=(partial,))"),
    "the result is overwritten while it is stored": ("tma.store_wait(0)  # what", "pass  # "),
    "no fence stands before the store": ("        fence_async_shared()\n        _store", "        _store"),
    "the last store is not awaited": ("    if c_desc is not None:\n        tma.store_wait(0)\n", ""),
    "a warpgroup reads the rows of another": ("+ GROUP // ABREAST)", ")"),
    "the scales of the block before are used": ("k + 1, blocks, a_step", "k, blocks, a_step"),
}  # fmt: skip
NEXT_WAIT = "        mbarrier.wait(full.index(slot), phase)\n        a_scale_ptrs"
LAST_SLOT = "        mbarrier.arrive(full.index(slot), count=1)\n"
FIRST_WAIT = "        mbarrier.wait(ring[3].index(slot), phase)\n"
AHEAD_FAULTS = {
    "a slot is read before its bytes have come": (NEXT_WAIT, "        a_scale_ptrs"),
    "the first slot is not awaited": (FIRST_WAIT, "        pass\n"),
    "nothing comes behind the last block": (LAST_SLOT, "        pass\n"),
    "a slot is given back while it is multiplied": (GIVE_BACK, GIVE_BACK.replace("index(held)", "index(slot)")),
    "the scales of the block before are used": ("+= gl.where(k < blocks, a_step", "+= gl.where(1 < k < blocks, a_step"),
    "scales are read past the last block": ("+= gl.where(k < blocks, a_step", "+= gl.where(k <= blocks, a_step"),
    "a warpgroup reads the rows of another": ("+ GROUP // ABREAST)", ")"),
}
QUAD_FAULTS = {
    "columns are taken in the order of the slot": ("permute((0, 2, 3, 1, 4))", "permute((0, 1, 2, 3, 4))"),
    "tiles start at rows that are no multiple of theirs": ("block_n * (BLOCK_N // 16)", "block_n * (BLOCK_N // 32)"),
    "a result takes the place of what it is added to": (
        'gl.atomic_add(c_ptrs, acc, mask=inside, sem="relaxed")', "gl.store(c_ptrs, acc, mask=inside)",
    ),
}  # fmt: skip
ABREAST_FAULTS = {
    "all multiply the same rows of b": ("slot * ABREAST + GROUP % ABREAST)\n", "slot * ABREAST)\n"),
    "all take the scales of the same rows": ("slot * ABREAST + GROUP % ABREAST).reshape", "slot * ABREAST).reshape"),
    "all write the same columns": ("tile_n * ABREAST + GROUP % ABREAST", "tile_n * ABREAST"),
    "rows of a are those of a tile that is not wide": ("MATH_GROUPS // ABREAST * BOX_M", "MATH_GROUPS * BOX_M"),
    "only one warpgroup's rows of b come": ("for box in gl.static_range(ABREAST):", "for box in gl.static_range(1):"),
    "tiles start at columns of tiles that are not wide": ("block_n = tile_n * ABREAST + box", "block_n = tile_n + box"),
    "a slot is free as soon as one warpgroup has read it": ("count=MATH_GROUPS", "count=1"),
}  # fmt: skip


PLANTED = [
    pytest.param(module, config, change, id=f"{config}-{fault}")
    for module, config, faults in (
        (gemm, "gluon_192x128_s4", FAULTS),
        (gemm_wgrad, "gluon_192x128_ahead_s5", AHEAD_FAULTS | QUAD_FAULTS),
        (gemm_wgrad, "gluon_64x256_k2_s5", ABREAST_FAULTS),
    )
    for fault, change in faults.items()
]


@on_a_cpu
@pytest.mark.parametrize(("module", "config", "change"), PLANTED)
def test_the_model_sees_a_fault(
    module: object, config: str, change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_gluon, "_gemm_gluon_kernel", Kernel(*faulty_modules(tmp_path, change)))
    with pytest.raises(SEEN):
        for _ in range(5):
            product(module, config)


@on_a_cpu
def test_a_slot_whose_scales_may_be_on_their_way_is_not_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted = "acc = gl.fma(partial, gl.expand_dims(scale, 1) * gl.expand_dims(b_scale, 0), acc)\n"
    changes = (
        (promoted, promoted + "        mbarrier.arrive(empty.index(slot), count=1)\n"),  # as it was: H200, 2026-11-26
        ("    if B_ROWS == 1:\n        mbarrier.arrive(empty.index(held), count=1)\n        held = slot\n", ""),
    )
    monkeypatch.setattr(gemm_gluon, "_gemm_gluon_kernel", Kernel(*faulty_modules(tmp_path, *changes)))
    with pytest.raises(Hazard, match="may be on its way"):
        product(gemm_wgrad, "gluon_128x128_k2_s6")


@on_a_cpu
def test_a_slot_whose_scales_may_be_on_their_way_is_not_given_back_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_gluon, "_gemm_gluon_kernel", Kernel(*faulty_modules(tmp_path, *EARLY_AHEAD)))
    with pytest.raises(Hazard, match="may be on its way"):
        product(gemm_wgrad, "gluon_192x128_ahead_s5")


def test_entries_for_hopper_are_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = quantized(32, 128, "e4m3 1x128", 1), quantized(32, 128, "e4m3 1x128", 2)
    for here in ((0, 0), (8, 9), (10, 0)):
        monkeypatch.setattr(gemm_launch, "capability", lambda device, here=here: here)
        for module, config in ENTRIES:
            reason = module.refusal(config, a.qdata, b.qdata, b.scale_inv)
            assert reason == f"config {config!r} is Gluon for Hopper, which no CPU interprets; needs a GPU of sm_90"


def test_scales_that_tma_cannot_read_are_refused() -> None:
    a, b = quantized(32, 256, "e4m3 1x128", 1), quantized(36, 256, "e4m3 1x128", 2)
    for scale in (b.scale_inv, m_contiguous(b.scale_inv)[1:], torch.empty(2, 37, device=DEVICE).T[:36]):
        rows = b.qdata[: scale.shape[0]]
        with pytest.raises(ValueError, match="reads b_scale by TMA; needs N contiguous, from a multiple of 16 bytes"):
            gemm_wgrad.gemm_wgrad(a.qdata, rows, a.scale_inv, scale, config="gluon_192x128_ahead_s5")


def test_rows_in_quads_are_refused_where_there_are_not_enough() -> None:
    a, b = quantized(32, 256, "e4m3 1x128", 1), quantized(40, 256, "e4m3 1x128", 2)
    with pytest.raises(ValueError, match="reads rows of b by 16; needs N that is a multiple of 16, got 40"):
        gemm_wgrad.gemm_wgrad(a.qdata, b.qdata, a.scale_inv, m_contiguous(b.scale_inv), config="gluon_192x128_ahead_s5")


def test_one_block_of_scales_may_have_any_step() -> None:
    a, b = quantized(40, 128, "e4m3 1x128", 1), quantized(36, 128, "e4m3 1x128", 2)
    assert b.scale_inv.stride() == (1, 1)
    y = gemm_wgrad.gemm_wgrad(a.qdata, b.qdata, a.scale_inv, b.scale_inv, config="gluon_128x128_k2_s6")
    assert_product(y, a, b)


CODE = """
setmaxnreg.dec.sync.aligned.u32 232;
wgmma.mma_async; wgmma.mma_async; wgmma.mma_async; wgmma.mma_async; mbarrier.try_wait
wgmma.wait_group.sync.aligned 0; bar.sync 0, 128; mbarrier.arrive.shared::cta.b64
fence.proxy.async; bar.sync 0, 128; cp.async.bulk.tensor.2d.global.shared
setmaxnreg.inc.sync.aligned.u32 232;
wgmma.mma_async; wgmma.mma_async; wgmma.mma_async; wgmma.mma_async; mbarrier.try_wait
wgmma.wait_group.sync.aligned 0; bar.sync 2, 128; bar.sync 2, 128; mbarrier.arrive.shared::cta.b64
fence.proxy.async; bar.sync 2, 128; cp.async.bulk.tensor.2d.global.shared
mbarrier.try_wait @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 32768;
mbarrier::complete_tx mbarrier::complete_tx mbarrier::complete_tx
"""


def test_machine_code_without_a_barrier_that_it_must_have_is_a_fault() -> None:
    constants = {"MATH_GROUPS": 2, "WAVES": 1, "BLOCK_N": 128, "IN_FLIGHT": 1, "B_ROWS": 128, "MATH_REGISTERS": 232}
    constants |= {"ABREAST": 1, "AHEAD": False}
    assert sm90.ring_faults(CODE, constants) == []
    for lost in (
        "bar.sync 0, 128; mbarrier",
        "bar.sync 2, 128; cp",
        "fence",
        "32768",
        "mbarrier.try_wait",
        "wgmma.mma",
        "u32 232",
    ):
        assert sm90.ring_faults(CODE.replace(lost, lost.split("; ")[-1] if ";" in lost else "-", 1), constants), lost


def test_machine_code_that_gives_slots_back_early_is_a_fault() -> None:
    block, pair = ["QGMMA R24;"] * 4, ["QGMMA R24;"] * 8
    back, promotion = ["@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR5];"], ["LDS.64 R2, [R4];", "FFMA R8, R2, R24, R8;"]
    slots = {"B_ROWS": 1}
    right = block + back + promotion + pair + back + back + promotion + block + back + promotion
    assert sm90.given_back_early(right, slots) == []
    for wrong in (
        block + promotion + back,
        block + promotion[:1] + back + promotion[1:],
        block + back + block + back + promotion,
        pair + back + promotion + back,
    ):
        assert sm90.given_back_early(wrong, slots) and not sm90.given_back_early(wrong, {"B_ROWS": 128})


def test_machine_code_that_reads_what_it_adds_to_is_a_fault() -> None:
    assert sm90.added_elsewhere(["REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR32][R26.64], R108 ;"]) == []
    for wrong in ("ATOMG.E.ADD.F32x4.FTZ.RN.STRONG.GPU PT, R4, desc[UR32][R26.64], R108 ;", "LDG.E.128 R4, [R2.64] ;"):
        assert sm90.added_elsewhere([wrong])


def test_what_a_loop_that_works_ahead_does_between_two_multiplications_is_counted() -> None:
    wait, start = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24 ;"
    loop = [
        "UIADD3 UR8, UR8, 0x2, URZ ;",
        start,
        "SYNCS.PHASECHK P0 ;",
        start,
        wait,
        "FFMA R8, R2, R24, R8;",
        "@P0 BRA L ;",
    ]
    assert sm90.idle_instructions(loop) == ["UIADD3", "FFMA", "BRA"]
    pair = [start, start, "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;", "FFMA R8, R2, R24, R8;", wait, "FMUL R2, R3, R4 ;"]
    assert sm90.idle_instructions(pair) == ["FMUL"]
    assert sm90.idle_faults(["FFMA", "FMUL", "LDS"], 1) == []
    assert sm90.idle_faults(["FFMA", "BAR"], 1) == ["BAR between two multiplications"]
    assert sm90.idle_faults(["FFMA"], 2) == ["1 promotions there; needs 2"], "one stands behind the next start"
