"""GEMM of wgrad: c [M, N] = a [M, K] @ b [N, K].T, or c += a @ b.T, in FP32; a and b in blocks of 1x128 along K.

Per 128 of K (tokens): acc = fma(partial, RN(a_scale * b_scale), acc) in FP32 (DeepSeek-V3, arXiv:2412.19437, 3.3.2).
a, b FP8, K-major; a_scale [M, ceil(K/128)], b_scale [N, ceil(K/128)] fp32, any strides (M- and N-contiguous are
fastest); c fp32, added to once: by entries with MATH_GROUPS in L2, which takes numbers below 2^-126 for zero. Any
M, N, K >= 0. Structure of the warp-specialised variant as in DeepGEMM: a TMA producer, two math warpgroups of 64x128.
Measured: kernels/README.md.
"""

import torch
import triton
import triton.language as tl

from fp8train.kernels.gemm_launch import Gemm
from fp8train.kernels.gemm_tile import BLOCK_K, TILE_ORDER, by_hand, num_blocks, tile_at

# In plain Triton 128x256 spills 204 bytes, 128x128 by pointers 176. Warp specialisation splits
# BLOCK_M = 128 into two warpgroups: with BLOCK_M = 64 both would compute the same tile, with num_warps=8 the pass does
# nothing. Entries with MATH_GROUPS are in gemm_gluon.py: TMA, 64 rows to a warpgroup.
CONFIGS = {
    "pointer_64x64_s3": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "tma_128x128_s4": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 4, "WARP_SPECIALIZE": False},
    "tma_64x128_s4": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 4, "WARP_SPECIALIZE": False},
    "ws_128x128_s4": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 4, "WARP_SPECIALIZE": True},
    "gluon_128x128_k2_s6": by_hand(math_groups=2, stages=6, in_flight=2, group_m=8),
    "gluon_192x128_ahead_s5": by_hand(math_groups=3, stages=5, ahead=True, group_m=8),
    "gluon_64x256_k2_s5": by_hand(math_groups=2, stages=5, in_flight=2, abreast=2, group_m=16),
    "gluon_64x256_ahead_s5": by_hand(math_groups=2, stages=5, abreast=2, ahead=True, group_m=16),
}
PLAIN = ("tma_128x128_s4", "pointer_64x64_s3")  # always correct: the first where TMA can read the strides


@triton.jit(do_not_specialize=["M"])
def _gemm_wgrad_pointer_kernel(
    a_ptr,  # [M, K] fp8
    b_ptr,  # [N, K] fp8
    c_ptr,  # [M, N] fp32
    a_scale_ptr,  # [M, ceil(K/128)]
    b_scale_ptr,  # [N, ceil(K/128)]
    M, N, K, stride_am, stride_bn, stride_cm, stride_sam, stride_sak, stride_sbn, stride_sbk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * stride_am + depth[None, :]
    b_ptrs = b_ptr + cols[:, None] * stride_bn + depth[None, :]
    a_scale_ptrs = a_scale_ptr + tl.minimum(rows, M - 1) * stride_sam
    b_scale_ptrs = b_scale_ptr + tl.minimum(cols, N - 1) * stride_sbn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, num_blocks(K, BLOCK_K)):
        left = depth[None, :] < K - k * BLOCK_K
        a = tl.load(a_ptrs, mask=(rows[:, None] < M) & left, other=0.0)
        b = tl.load(b_ptrs, mask=(cols[:, None] < N) & left, other=0.0)
        scale = tl.load(a_scale_ptrs)[:, None] * tl.load(b_scale_ptrs)[None, :]
        acc = tl.fma(tl.dot(a, b.T), scale, acc)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
        a_scale_ptrs += stride_sak
        b_scale_ptrs += stride_sbk
    c_ptrs = c_ptr + rows[:, None] * stride_cm + cols[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    if ACCUMULATE:
        acc += tl.load(c_ptrs, mask=inside, other=0.0)
    tl.store(c_ptrs, acc, mask=inside)


@triton.jit(do_not_specialize=["M", "K"])
def _gemm_wgrad_tma_kernel(
    a_ptr,  # [M, K] fp8, rows 16-byte aligned
    b_ptr,  # [N, K] fp8, rows 16-byte aligned
    c_ptr,  # [M, N] fp32
    a_scale_ptr,  # [M, ceil(K/128)]
    b_scale_ptr,  # [N, ceil(K/128)]
    M, N, K, stride_am, stride_bn, stride_cm, stride_sam, stride_sak, stride_sbn, stride_sbk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, ACCUMULATE: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    # descriptors made on the device: the pass that specialises warps cannot split host ones (triton-lang/triton#11587)
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_am, 1], [BLOCK_M, BLOCK_K])
    b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_bn, 1], [BLOCK_N, BLOCK_K])
    a_step, b_step = tl.cast(stride_sak, tl.int64), tl.cast(stride_sbk, tl.int64)
    tiles = num_blocks(M, BLOCK_M) * num_blocks(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        tile_m, tile_n = tile_at(index, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        a_scale_ptrs = a_scale_ptr + tl.minimum(rows, M - 1) * stride_sam
        b_scale_ptrs = b_scale_ptr + tl.minimum(cols, N - 1) * stride_sbn
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, num_blocks(K, BLOCK_K)):
            a = a_desc.load([tile_m * BLOCK_M, k * BLOCK_K])
            b = b_desc.load([tile_n * BLOCK_N, k * BLOCK_K])
            a_scale = tl.load(a_scale_ptrs + k * a_step)
            b_scale = tl.load(b_scale_ptrs + k * b_step)
            acc = tl.fma(tl.dot(a, b.T), a_scale[:, None] * b_scale[None, :], acc)
        c_ptrs = c_ptr + rows[:, None] * stride_cm + cols[None, :]
        inside = (rows[:, None] < M) & (cols[None, :] < N)
        if ACCUMULATE:
            acc += tl.load(c_ptrs, mask=inside, other=0.0)
        tl.store(c_ptrs, acc, mask=inside)


def _compile_cases():
    """Each entry of CONFIGS as launched on aligned operands; pointers also on odd strides and other formats."""
    strides = ("stride_am", "stride_bn", "stride_cm", "stride_sak", "stride_sbk")
    pointers = {
        "a_ptr": "*fp8e4nv",
        "b_ptr": "*fp8e4nv",
        "c_ptr": "*fp32",
        "a_scale_ptr": "*fp32",
        "b_scale_ptr": "*fp32",
    }
    signature = pointers | dict.fromkeys(("M", "N", "K", *strides), "i32")
    cases = []
    for name, entry in CONFIGS.items():
        if "MATH_GROUPS" in entry:
            continue  # compiled by gemm_gluon.compile_cases
        kernel = _gemm_wgrad_tma_kernel if "WARP_SPECIALIZE" in entry else _gemm_wgrad_pointer_kernel
        tile = {key: value for key, value in entry.items() if key.isupper()} | TILE_ORDER
        options = {key: value for key, value in entry.items() if key.islower()} | {"enable_fp_fusion": True}
        options["odd"] = ("M",) if kernel is _gemm_wgrad_pointer_kernel else ("M", "K")  # not specialised
        constants = tile | {"stride_sam": 1, "stride_sbn": 1, "ACCUMULATE": True}
        cases.append((f"gemm_wgrad {name}", kernel, signature, constants, options))
    plain = cases[0]
    odd = {"odd": ("M", "N", "K", *strides)}
    cases.append(("gemm_wgrad pointer_64x64_s3 odd strides", *plain[1:4], plain[4] | odd))
    cases.append(("gemm_wgrad pointer_64x64_s3 e5m2 x e4m3", plain[1], plain[2] | {"a_ptr": "*fp8e5"}, *plain[3:]))
    return cases


# (name, kernel, signature, constexprs, options); integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


GEMM = Gemm(
    name="gemm_wgrad", b_rows=1, out_dtypes=(torch.float32,), configs=CONFIGS, plain=PLAIN,
    pointer_kernel=_gemm_wgrad_pointer_kernel, tma_kernel=_gemm_wgrad_tma_kernel,
)  # fmt: skip


def gemm_wgrad(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    config: str | None = None,
) -> torch.Tensor:
    """c [M, N] = a @ b.T in fp32, or `out` += a @ b.T; config: an entry of CONFIGS, None for a plain one.

    Raises:
        ValueError: dtype, layout or shape of an operand, an `out` that overlaps one or itself, an entry that cannot
            read them.
    """
    if out is None and accumulate:
        raise ValueError("gemm_wgrad: accumulate is set without out; needs the matrix to add to. Pass out=.")
    return GEMM(a, b, a_scale, b_scale, None, out, torch.float32, accumulate, config)


def refusal(config: str, a: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> str | None:
    """Why an entry of CONFIGS cannot multiply these operands, or None."""
    return GEMM.refusal(config, a, b, b_scale)
