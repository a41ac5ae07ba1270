"""Quantize a weight in blocks of 128x128: codes, their byte transpose, and the scales in both orders, from one read.

w [N, K] fp32 (the master) or bf16, row-major, any leading stride -> qdata [N, K], qdata of w.T [K, N], the same bytes;
scale_inv [ceil(N/128), ceil(K/128)] fp32 and its transpose. Scales and codes as in quantize.py, bit for bit as
fp8train.quant.reference.quantize with blocks of 128x128.
One program: one block. What quantize.py has too is the same there, held by tests: kernel files import no other.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3. Measured: not on hardware yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
NUM_WARPS = 8
SIZE_LIMIT = 2**31

INF_BITS = tl.constexpr(0x7F800000)
ONE_BITS = tl.constexpr(0x3F800000)
MIN_NORMAL = tl.constexpr(2.0**-126)
MIN_NORMAL_BITS = tl.constexpr(0x00800000)


@triton.jit
def _scales(amax_bits, MAX_BITS: tl.constexpr, POW2: tl.constexpr):
    """Bits of amax -> scale_inv and encode_scale = 1 / scale_inv, fp32; MAX_BITS: those of the format's maximum."""
    if POW2:
        # amax / max <= 2^k just where amax <= max * 2^k, so the division and its inverse are integer sums on the bits
        scale_bits = (amax_bits + (0x7FFFFF - MAX_BITS % 0x800000)) & INF_BITS
        scale_bits = tl.maximum(scale_bits - (MAX_BITS // 0x800000 - 127) * 0x800000, MIN_NORMAL_BITS)
        scale_bits = tl.where(amax_bits == 0, ONE_BITS, scale_bits)
        scale_inv = scale_bits.to(tl.float32, bitcast=True)
        encode_scale = (0x7F000000 - scale_bits).to(tl.float32, bitcast=True)
    else:
        limit = tl.full([], MAX_BITS, tl.int32).to(tl.float32, bitcast=True)
        scale_inv = tl.maximum(tl.div_rn(amax_bits.to(tl.float32, bitcast=True), limit), MIN_NORMAL)
        scale_inv = tl.where(amax_bits == 0, 1.0, scale_inv)
        encode_scale = tl.div_rn(1.0, scale_inv)
    finite = amax_bits < INF_BITS
    return tl.where(finite, scale_inv, float("nan")), tl.where(finite, encode_scale, float("nan"))


@triton.jit
def _magnitude_bits(x):
    """Bits of |x|, whose maximum is that of the numbers, or a NaN's: a floating-point maximum drops NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _quarter(i, m, k, M, K):
    """Rows [32] and columns [128] of quarter i of the tile at (m, k), from its corner, and which are inside [M, K]."""
    rows, cols = 4 * tl.arange(0, 32) + i, tl.arange(0, 128)
    return rows, cols, (rows < (M - m).to(tl.int32))[:, None] & (cols < (K - k).to(tl.int32))[None, :]


@triton.jit
def _word_byte(code, SHIFT: tl.constexpr):
    """An FP8 code as a byte of an int32."""
    return code.to(tl.uint8, bitcast=True).to(tl.int32) << SHIFT


@triton.jit
def _store_transposed(codes, m, k, K, qdata_ptr, stride_qk):
    """Store the FP8 quarters [32, 128] of the tile at (m, k) transposed, in qdata [K, M]; its rows are stored whole.

    Four rows become one 32-bit word within a thread and the words are transposed: a fourth of the shared memory
    accesses, and no FP8 tile is ever transposed, which ptxas 12.x miscompiles (triton-lang/triton#11111).
    """
    words = _word_byte(codes[0], 0) | _word_byte(codes[1], 8) | _word_byte(codes[2], 16) | _word_byte(codes[3], 24)
    cols = tl.arange(0, 128)[:, None]
    words_ptr = (qdata_ptr + k * stride_qk + m).to(tl.pointer_type(tl.int32), bitcast=True)
    words_ptr += cols.to(tl.int64) * (stride_qk // 4) + tl.arange(0, 32)[None, :]
    tl.store(words_ptr, tl.trans(words), mask=cols < (K - k).to(tl.int32))


@triton.jit
def _load(x_ptr, stride_xm, i, m, k, M, K):
    """Quarter i of the tile at (m, k) of x [M, K], fp32, zero outside."""
    rows, cols, inside = _quarter(i, m, k, M, K)
    x_ptr += m * stride_xm + k + rows.to(tl.int64)[:, None] * stride_xm + cols[None, :]
    return tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _losses(x, encode_scale, inside, FP8: tl.constexpr, MAX_BITS: tl.constexpr):
    """Of a quarter's rows: bits of the finite amax [32]; flushed, saturated, non-finite counts [32], 10 bits each."""
    bits, scaled = _magnitude_bits(x), encode_scale * x
    finite = inside & (bits < INF_BITS)
    codes = scaled.to(FP8).to(tl.uint8, bitcast=True)
    flushed = finite & (bits != 0) & ((codes & 0x7F) == 0)  # a zero stays zero, whatever its sign
    # an fp32 scale, rounded twice, takes amax up to 4 ulp beyond the maximum
    saturated = finite & (_magnitude_bits(scaled) > MAX_BITS + 4) & (_magnitude_bits(scaled) < INF_BITS)
    nonfinite = inside & (bits >= INF_BITS)
    counts = flushed.to(tl.int32) | (saturated.to(tl.int32) << 10) | (nonfinite.to(tl.int32) << 20)
    return tl.max(tl.where(finite, bits, 0), axis=1), tl.sum(counts, axis=1)


@triton.jit
def _add_statistics(stats_ptr, amax_bits, counts, m, k, M, K):
    """Add the losses of a tile at (m, k) to stats [5] int64, in the order of STATISTICS."""
    tl.atomic_max(stats_ptr, tl.max(amax_bits).to(tl.int64))
    tl.atomic_add(stats_ptr + 1, tl.sum(counts & 0x3FF).to(tl.int64))
    tl.atomic_add(stats_ptr + 2, tl.sum((counts >> 10) & 0x3FF).to(tl.int64))
    tl.atomic_add(stats_ptr + 3, tl.sum(counts >> 20).to(tl.int64))
    tl.atomic_add(stats_ptr + 4, tl.minimum(M - m, 128) * tl.minimum(K - k, 128))


@triton.jit
def _quantize_weight_kernel(
    w_ptr,  # [N, K] fp32 or bf16
    qdata_ptr, scale_inv_ptr,  # [N, K] fp8, [ceil(N/128), ceil(K/128)] fp32
    qdata_t_ptr, scale_inv_t_ptr,  # [K, N] fp8, [ceil(K/128), ceil(N/128)] fp32
    stats_ptr,  # [5] int64
    N, K, stride_wn, stride_qn, stride_qk,
    MAX_BITS: tl.constexpr, POW2: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_k = (N - 1) // 128 + 1, (K - 1) // 128 + 1  # N + 127 could overflow
    tile_n, tile_k = (tl.program_id(0) // tiles_k).to(tl.int64), (tl.program_id(0) % tiles_k).to(tl.int64)
    n, k = tile_n * 128, tile_k * 128
    w = (
        _load(w_ptr, stride_wn, 0, n, k, N, K),
        _load(w_ptr, stride_wn, 1, n, k, N, K),
        _load(w_ptr, stride_wn, 2, n, k, N, K),
        _load(w_ptr, stride_wn, 3, n, k, N, K),
    )
    low = tl.maximum(_magnitude_bits(w[0]), _magnitude_bits(w[1]))
    high = tl.maximum(_magnitude_bits(w[2]), _magnitude_bits(w[3]))
    scale_inv, encode_scale = _scales(tl.max(tl.maximum(low, high)), MAX_BITS, POW2)
    codes = (
        (encode_scale * w[0]).to(qdata_ptr.dtype.element_ty),
        (encode_scale * w[1]).to(qdata_ptr.dtype.element_ty),
        (encode_scale * w[2]).to(qdata_ptr.dtype.element_ty),
        (encode_scale * w[3]).to(qdata_ptr.dtype.element_ty),
    )
    if STRAIGHT:
        for i in tl.static_range(4):
            rows, cols, inside = _quarter(i, n, k, N, K)
            offsets = n * stride_qn + k + rows.to(tl.int64)[:, None] * stride_qn + cols[None, :]
            tl.store(qdata_ptr + offsets, codes[i], mask=inside)
        tl.store(scale_inv_ptr + tile_n * tiles_k + tile_k, scale_inv)
    if TRANSPOSED:
        _store_transposed(codes, n, k, K, qdata_t_ptr, stride_qk)
        tl.store(scale_inv_t_ptr + tile_k * tiles_n + tile_n, scale_inv)
    if STATS and STRAIGHT:
        amax_bits, counts = tl.zeros([32], tl.int32), tl.zeros([32], tl.int32)
        for i in range(4):  # read again: keeping both copies' numbers alive takes twice the registers
            _, _, inside = _quarter(i, n, k, N, K)
            again = _load(w_ptr, stride_wn, i, n, k, N, K)
            amax_of_rows, counts_of_rows = _losses(again, encode_scale, inside, qdata_ptr.dtype.element_ty, MAX_BITS)
            amax_bits, counts = tl.maximum(amax_bits, amax_of_rows), counts + counts_of_rows
        _add_statistics(stats_ptr, amax_bits, counts, n, k, N, K)


def _compile_cases() -> list[tuple]:
    """What tests compile: both dtypes of w and kinds of scale, E5M2, each of two launches, ragged sizes, counting."""
    sizes = ("N", "K", "stride_wn", "stride_qn", "stride_qk")
    pointers = dict.fromkeys(("qdata_ptr", "qdata_t_ptr"), "*fp8e4nv")
    pointers |= dict.fromkeys(("scale_inv_ptr", "scale_inv_t_ptr"), "*fp32")
    options = {"num_warps": NUM_WARPS}
    cases = []
    for dtype in ("fp32", "bf16"):
        for pow2 in (True, False):
            signature = {"w_ptr": f"*{dtype}"} | pointers | dict.fromkeys(sizes, "i32")
            constants = {"MAX_BITS": 0x43E00000, "POW2": pow2, "STRAIGHT": True, "TRANSPOSED": True, "STATS": False}
            title = f"quantize_weight {dtype} {'pow2' if pow2 else 'fp32'}"
            cases.append((title, _quantize_weight_kernel, signature, constants | {"stats_ptr": None}, options))
    title, kernel, signature, constants, _ = cases[0]
    e5m2 = signature | {"qdata_ptr": "*fp8e5", "qdata_t_ptr": "*fp8e5"}
    counting = {key: value for key, value in constants.items() if key != "stats_ptr"} | {"STATS": True}
    cases.append((f"{title} e5m2", kernel, e5m2, constants | {"MAX_BITS": 0x47600000}, options))
    cases.append((f"{title} straight", kernel, signature, constants | {"TRANSPOSED": False}, options))
    cases.append((f"{title} transposed", kernel, signature, constants | {"STRAIGHT": False}, options))
    cases.append((f"{title} ragged", kernel, signature, constants, options | {"odd": sizes[:3]}))
    cases.append((f"{title} stats", kernel, signature | {"stats_ptr": "*i64"}, counting, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def quantize_weight(
    w: Tensor,
    *,
    fp8_dtype: torch.dtype,
    fp8_max: float,
    pow2: bool,
    block: int = BLOCK,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    stats: Tensor | None = None,
    two_launches: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of w and of w.T with one scale per block of 128x128.

    Args:
        w: [N, K] fp32 or bf16, row-major with any leading stride, on a GPU; any N, K >= 0.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        fp8_max: largest finite number of that format.
        pow2: round the scales up to powers of two.
        block: 128.
        out: what an earlier call for the same shape returned, to be overwritten.
        stats: [5] int64, as in quantize.STATISTICS: amax is maximised into it, counts are added; None counts nothing.
        two_launches: write each copy by a kernel of its own, two reads: for a toolchain that miscompiles the pair.

    Returns:
        (qdata [N, K], scale_inv [ceil(N/128), ceil(K/128)], qdata of w.T [K, N], scale_inv of w.T). The leading strides
        of the codes are multiples of 16, and of 128 for w.T.

    Raises:
        ValueError: w, the format, the block, out or stats do not fit.
    """
    _check(w, fp8_dtype, block, stats)
    N, K = w.shape
    blocks_n, blocks_k = -(-N // BLOCK), -(-K // BLOCK)
    if out is None:
        qdata, qdata_t = _empty_codes(w, N, K, fp8_dtype, 16), _empty_codes(w, K, N, fp8_dtype, BLOCK)
        scale_inv = torch.empty(blocks_n, blocks_k, dtype=torch.float32, device=w.device)
        out = qdata, scale_inv, qdata_t, torch.empty_like(scale_inv.t(), memory_format=torch.contiguous_format)
    else:
        _check_out(w, out, fp8_dtype)
    if N == 0 or K == 0:
        return out
    qdata, scale_inv, qdata_t, scale_inv_t = out
    for straight, transposed in ((True, False), (False, True)) if two_launches else ((True, True),):
        _quantize_weight_kernel[(blocks_n * blocks_k,)](
            w, qdata, scale_inv, qdata_t, scale_inv_t, stats, N, K, w.stride(0), qdata.stride(0), qdata_t.stride(0),
            MAX_BITS=_max_bits(fp8_max), POW2=pow2, STRAIGHT=straight, TRANSPOSED=transposed, STATS=stats is not None,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def _empty_codes(x: Tensor, rows: int, cols: int, dtype: torch.dtype, multiple: int) -> Tensor:
    """[rows, cols] with a leading stride that is a multiple of `multiple`: TMA wants 16 bytes, whole tiles 128."""
    padded = -(-cols // multiple) * multiple
    return torch.empty(rows, padded, dtype=dtype, device=x.device)[:, :cols]


def _max_bits(fp8_max: float) -> int:
    """Bit pattern of fp8_max as an fp32 number."""
    fraction, exponent = math.frexp(fp8_max)
    return (exponent + 126 << 23) | int((2 * fraction - 1) * 2**23)


def _check(w: Tensor, fp8_dtype: torch.dtype, block: int, stats: Tensor | None) -> None:
    """Raise ValueError unless w is a row-major matrix and format, block and stats are ones that the kernel serves."""
    name = "quantize_weight"
    if w.dim() != 2 or w.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"{name}: w is {list(w.shape)} {w.dtype}; needs [N, K] in torch.float32 or torch.bfloat16. "
            "Reshape or cast it."
        )
    if w.shape[1] > 1 and w.shape[0] > 0 and w.stride(1) != 1:
        raise ValueError(f"{name}: w has strides {w.stride()}; needs (any, 1). Pass w.contiguous().")
    if max(w.shape) >= SIZE_LIMIT:
        raise ValueError(f"{name}: w is {list(w.shape)}; needs dimensions below 2^31. Split it.")
    if fp8_dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"{name}: fp8_dtype is {fp8_dtype}; needs torch.float8_e4m3fn or torch.float8_e5m2.")
    if block != BLOCK:
        raise ValueError(f"{name}: block is {block}; needs {BLOCK}. Other blocks run on backend=reference.")
    if stats is not None and (stats.shape != (5,) or stats.dtype is not torch.int64 or not stats.is_contiguous()):
        raise ValueError(f"{name}: stats is {list(stats.shape)} {stats.dtype}; needs [5] torch.int64, contiguous.")


def _check_out(w: Tensor, out: tuple[Tensor, Tensor, Tensor, Tensor], fp8_dtype: torch.dtype) -> None:
    """Raise ValueError unless the kernel can write to `out` for w."""
    N, K = w.shape
    blocks = -(-N // BLOCK), -(-K // BLOCK)
    wanted = ((N, K), fp8_dtype), (blocks, torch.float32), ((K, N), fp8_dtype), (blocks[::-1], torch.float32)
    got = tuple((tuple(tensor.shape), tensor.dtype) for tensor in out)
    if got != wanted:
        raise ValueError(f"quantize_weight: out is {got}; needs {wanted}. Pass what a call for this weight returned.")
    if min(N, K) == 0:
        return
    qdata, scale_inv, qdata_t, scale_inv_t = out
    whole_rows = qdata_t.stride(0) % 4 == 0 and qdata_t.stride(0) >= BLOCK * blocks[0] and qdata_t.data_ptr() % 4 == 0
    dense = qdata.stride(1) == qdata_t.stride(1) == 1 and scale_inv.is_contiguous() and scale_inv_t.is_contiguous()
    room = qdata_t.untyped_storage().nbytes() - qdata_t.storage_offset() >= K * qdata_t.stride(0)
    if not (whole_rows and dense and room):
        raise ValueError(
            f"quantize_weight: out has strides {[tensor.stride() for tensor in out]}; needs row-major codes, "
            f"contiguous scales, and for the codes of w.T whole rows of {BLOCK * blocks[0]}. "
            "Pass what a call for this weight returned."
        )
    storages = [tensor.untyped_storage().data_ptr() for tensor in (w, *out)]
    if len(set(storages)) < len(storages):
        raise ValueError("quantize_weight: out shares memory with w or within itself; needs tensors of their own.")
