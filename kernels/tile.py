"""What the quantisers share: the scale of a block, and a tile of 128x128 read once and written as both copies.

scale_inv = amax / fp8_max, rounded up to 2^k for pow2, at least 2^-126, 1 for an all-zero block, NaN for a block with a
NaN or an Inf; qdata = saturate(x * (1 / scale_inv)), bit for bit as fp8train.quant.reference.quantize.

A tile is STRIPS strips (strip i: rows STRIPS j + i), so that the neighbouring rows of a column meet in a thread, which
writes four of them as a word. One pass over them finds the scales of the columns, a second one writes both copies;
between the two they are kept as BF16, two to a word, or calculated again. Row copy: qdata [M, K], scale_inv
[M, ceil(K/128)], M contiguous. Column copy: qdata [K, M], scale_inv [K, ceil(M/128)], K contiguous. Leading dimensions
are padded (empty_codes, empty_scales in tile_launch.py): tiles are stored, and read by a GEMM, whole.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter knows no assembly
INF_BITS = tl.constexpr(0x7F800000)
ONE_BITS = tl.constexpr(0x3F800000)
MIN_NORMAL = tl.constexpr(2.0**-126)
MIN_NORMAL_BITS = tl.constexpr(0x00800000)
HIGH_HALF = tl.constexpr(0xFFFE0000)  # of shifted_bits: what BF16 holds


@triton.jit
def scales(amax_bits, MAX_BITS: tl.constexpr, POW2: tl.constexpr):
    """Bits of amax -> scale_inv and encode_scale = 1 / scale_inv, fp32; MAX_BITS: those of the format's maximum."""
    if POW2:
        # amax / max <= 2^k just where amax <= max * 2^k, so the division and its inverse are integer sums on the bits
        scale_bits = (amax_bits + (0x7FFFFF - MAX_BITS % 0x800000)) & INF_BITS
        scale_bits = tl.maximum(scale_bits - (MAX_BITS // 0x800000 - 127) * 0x800000, MIN_NORMAL_BITS)
        scale_inv = tl.where(amax_bits == 0, ONE_BITS, scale_bits).to(tl.float32, bitcast=True)
        encode_scale = (0x7F000000 - scale_bits).to(tl.float32, bitcast=True)  # times 0 is 0, whatever it is
    else:
        limit = tl.full([], MAX_BITS, tl.int32).to(tl.float32, bitcast=True)
        scale_inv = tl.maximum(tl.div_rn(amax_bits.to(tl.float32, bitcast=True), limit), MIN_NORMAL)
        scale_inv = tl.where(amax_bits == 0, 1.0, scale_inv)
        encode_scale = tl.div_rn(1.0, scale_inv)
    finite = amax_bits < INF_BITS
    return tl.where(finite, scale_inv, float("nan")), tl.where(finite, encode_scale, float("nan"))


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, whose maximum is that of the numbers, or a NaN's: a floating-point maximum drops NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def shifted_bits(x):
    """Bits of |x| shifted left, uint32: the sign is gone in one instruction."""
    return x.to(tl.uint32, bitcast=True) << 1


@triton.jit
def strip(i, m, k, M, K, STRIPS: tl.constexpr):
    """Rows STRIPS j + i [128 / STRIPS] and columns [128] of the tile at (m, k), from its corner; which are inside."""
    rows, cols = STRIPS * tl.arange(0, 128 // STRIPS) + i, tl.arange(0, 128)
    return rows, cols, (rows < (M - m).to(tl.int32))[:, None] & (cols < (K - k).to(tl.int32))[None, :]


@triton.jit
def hinted_strip(x_ptr, stride_xm, i, m, k, M, K, STRIPS: tl.constexpr, EVICT: tl.constexpr):
    """As load_strip; EVICT: the eviction policy of its lines."""
    _, _, inside = strip(i, m, k, M, K, STRIPS)
    rows, cols = STRIPS * tl.arange(0, 128 // STRIPS), tl.arange(0, 128)
    x_ptr += (m + i) * stride_xm + k  # a scalar: the strips share the offsets below
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + cols[None, :]
    return tl.load(x_ptrs, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)


@triton.jit
def load_strip(x_ptr, stride_xm, i, m, k, M, K, STRIPS: tl.constexpr):
    """Strip i of the tile at (m, k) of x [M, K], fp32, zero outside."""
    return hinted_strip(x_ptr, stride_xm, i, m, k, M, K, STRIPS, "")


@triton.jit
def store_strip(x, out_ptr, stride_om, i, m, k, M, K, STRIPS: tl.constexpr):
    """Write strip i of a tile in the dtype of out [M, K]."""
    _, _, inside = strip(i, m, k, M, K, STRIPS)
    rows, cols = STRIPS * tl.arange(0, 128 // STRIPS), tl.arange(0, 128)
    out_ptr += (m + i) * stride_om + k
    offsets = rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def four_strips(STRIP: tl.constexpr, arguments, i, m, k, M, K, STRIPS: tl.constexpr):
    """Strips i to i + 3; all before the first is used, so that their loads are in flight together."""
    return (
        STRIP(*arguments, i, m, k, M, K, STRIPS), STRIP(*arguments, i + 1, m, k, M, K, STRIPS),
        STRIP(*arguments, i + 2, m, k, M, K, STRIPS), STRIP(*arguments, i + 3, m, k, M, K, STRIPS),
    )  # fmt: skip


@triton.jit
def store_plain(STRIP: tl.constexpr, arguments, out_ptr, stride_om, m, k, M, K):
    """Write a tile unquantised."""
    x = four_strips(STRIP, arguments, 0, m, k, M, K, 4)
    for i in tl.static_range(4):
        store_strip(x[i], out_ptr, stride_om, i, m, k, M, K, 4)


@triton.jit
def row_amax_bits(x, words, KEEP: tl.constexpr):
    """Bits of the largest magnitudes of the rows of a strip."""
    if KEEP:
        even, odd = shifted_halves(words)
        even = tl.max(tl.reshape(even, [words.shape[0], 16, 4]), axis=2)
        odd = tl.max(tl.reshape(odd, [words.shape[0], 16, 4]), axis=2)
        return unshifted(tl.max(tl.maximum(even, odd & HIGH_HALF), axis=1))
    else:
        return unshifted(tl.max(shifted_bits(x), axis=1))


@triton.jit
def store_row_codes(
    x, words,  # strip i of the tile at (m, k), fp32; if KEEP, its words
    qdata_ptr,  # [M, K] fp8
    stride_qm, i, m, k, M, K, MAX_BITS: tl.constexpr, POW2: tl.constexpr, STRIPS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write the codes of the row copy of a strip; the bits of the largest magnitudes of its rows."""
    amax_bits = row_amax_bits(x, words, KEEP)
    _, encode_scale = scales(amax_bits, MAX_BITS, POW2)
    store_strip(encode_scale[:, None] * x, qdata_ptr, stride_qm, i, m, k, M, K, STRIPS)
    return amax_bits


@triton.jit
def store_row_scales(
    amax_bits, scale_inv_ptr, stride_sk, m, k, M, STRIPS: tl.constexpr, MAX_BITS: tl.constexpr, POW2: tl.constexpr
):  # fmt: skip
    """Write the scales of the row copy of a tile from the magnitudes that `encode` returned."""
    rows = tl.arange(0, 128)
    amax_bits = tl.permute(tl.reshape(amax_bits, [128 // STRIPS, 4, STRIPS // 4]), (0, 2, 1))
    scale_inv, _ = scales(tl.reshape(amax_bits, [128]), MAX_BITS, POW2)
    tl.store(scale_inv_ptr + k // 128 * stride_sk + m + rows, scale_inv, mask=rows < (M - m).to(tl.int32))


@triton.jit
def packed(x):
    """Numbers of a strip that BF16 holds, two neighbours to a word, so that they can wait in half the registers."""
    bits = x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    even, odd = tl.split(tl.reshape(bits, [x.shape[0], 64, 2]))
    return even & 0xFFFF | (odd << 16)


@triton.jit
def unpacked(words):
    """The strip of such words."""
    even, odd = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(even, odd), [words.shape[0], 128])


@triton.jit
def shifted_halves(words):
    """What shifted_bits gives of the even and of the odd numbers; of the latter the bits of HIGH_HALF."""
    words = words.to(tl.uint32, bitcast=True)
    return words << 17, words << 1


@triton.jit
def unshifted(bits):
    """Bits of |x| from shifted_bits."""
    return (bits >> 1).to(tl.int32, bitcast=True)


@triton.jit
def measured_strip(x, zero, KEEP: tl.constexpr):
    """What `measure` returns, of one strip."""
    if KEEP:
        words = packed(x) ^ zero  # the compiler would keep numbers that it sees to be packed and unpacked again
        even, odd = words * (zero + 0x20000), words * (zero + 2)  # and shifted_halves until encode takes them again
        return even.to(tl.uint32, bitcast=True), odd.to(tl.uint32, bitcast=True), words
    else:
        return shifted_bits(x), zero, zero


@triton.jit
def measured_strips(x, y, KEEP: tl.constexpr):
    """What `measure` returns of the strips of x and of y."""
    if KEEP:
        return tl.maximum(x[0], y[0]), tl.maximum(x[1], y[1]), tl.join(x[2], y[2])
    else:
        return tl.maximum(x[0], y[0]), x[1], x[2]


@triton.jit
def measure(
    STRIP: tl.constexpr, arguments, zero, m, k, M, K, i: tl.constexpr, STEP: tl.constexpr, STRIPS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Largest magnitudes in each column of strips i to i + 3, STEP further to STEP + 3 further, ...

    As shifted_bits [128 / STRIPS, 128], and no more; if KEEP, as shifted_halves [128 / STRIPS, 64], and the words of
    the strips.
    """
    if STEP == STRIPS:
        x = (
            measured_strip(STRIP(*arguments, i, m, k, M, K, STRIPS), zero, KEEP),
            measured_strip(STRIP(*arguments, i + 1, m, k, M, K, STRIPS), zero, KEEP),
            measured_strip(STRIP(*arguments, i + 2, m, k, M, K, STRIPS), zero, KEEP),
            measured_strip(STRIP(*arguments, i + 3, m, k, M, K, STRIPS), zero, KEEP),
        )
        return measured_strips(measured_strips(x[0], x[2], KEEP), measured_strips(x[1], x[3], KEEP), KEEP)
    else:
        x = measure(STRIP, arguments, zero, m, k, M, K, i, 2 * STEP, STRIPS, KEEP)
        y = measure(STRIP, arguments, zero, m, k, M, K, i + STEP, 2 * STEP, STRIPS, KEEP)
        return measured_strips(x, y, KEEP)


@triton.jit
def column_scales(amax, odd_amax, MAX_BITS: tl.constexpr, POW2: tl.constexpr, KEEP: tl.constexpr):
    """scale_inv and encode_scale [128] of the columns of a tile from what `measure` returned.

    A thread holds 8 neighbouring columns: reduced in that order, 16 threads of a warp meet in a bank of shared memory.
    """
    rows: tl.constexpr = amax.shape[0]
    if KEEP:
        amax = tl.reshape(tl.join(amax, odd_amax & HIGH_HALF), [rows, 128])
    apart = tl.reshape(tl.permute(tl.reshape(amax, [rows, 16, 8]), (0, 2, 1)), [rows, 128])
    together = tl.permute(tl.reshape(tl.max(apart, axis=0), [8, 16]), (1, 0))
    return scales(unshifted(tl.reshape(together, [128])), MAX_BITS, POW2)


@triton.jit
def column_halves(x, y, encode_scale, FP8: tl.constexpr):
    """FP8 codes of two strips, those of neighbours in a column side by side, int32 [rows, 128].

    Neighbours in a tensor are converted in pairs. Here they are rows, so that a pair is half of a word of the column
    copy, and that no conversion is shared with the row copy: ptxas 12.x loses bytes of an FP8 pair that is stored both
    straight and transposed (triton-lang/triton#11111).
    """
    codes = tl.join(encode_scale * x, encode_scale * y).to(FP8).to(tl.uint8, bitcast=True).to(tl.int32)
    even, odd = tl.split(codes)
    return even | (odd << 8)


@triton.jit
def encode_two(
    STRIP: tl.constexpr, arguments, words, encode_scale, row_ptr, stride_row, m, k, M, K, i,
    FP8: tl.constexpr, MAX_BITS: tl.constexpr, POW2: tl.constexpr, ROW: tl.constexpr, STRIPS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """What `encode` does for strips i and i + 1; returns halves of words."""
    if KEEP:
        x, y = unpacked(words[0]), unpacked(words[1])
    else:
        x, y = STRIP(*arguments, i, m, k, M, K, STRIPS), STRIP(*arguments, i + 1, m, k, M, K, STRIPS)
    amax_bits = tl.zeros([128 // STRIPS, 2], tl.int32)
    if ROW:
        amax_bits = tl.join(
            store_row_codes(x, words[0], row_ptr, stride_row, i, m, k, M, K, MAX_BITS, POW2, STRIPS, KEEP),
            store_row_codes(y, words[1], row_ptr, stride_row, i + 1, m, k, M, K, MAX_BITS, POW2, STRIPS, KEEP),
        )
    return column_halves(x, y, encode_scale, FP8), amax_bits


@triton.jit
def encode(
    STRIP: tl.constexpr, arguments, words, encode_scale, row_ptr, stride_row, m, k, M, K, i: tl.constexpr,
    STEP: tl.constexpr, FP8: tl.constexpr, MAX_BITS: tl.constexpr, POW2: tl.constexpr, ROW: tl.constexpr,
    STRIPS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write the codes of the row copy of strips i to i + 3, STEP further to STEP + 3 further, ...

    Returns words of the codes of the column copy [128 / STRIPS, 128, 2, ...] in the order of the strips, and the bits
    of the largest magnitudes of the rows [128 / STRIPS, 2, 2, 2, ...], those of i to i + 3 in the first two of these
    dimensions.
    """
    if STEP == STRIPS:
        one, two = (words, words), (words, words)
        if KEEP:
            low, high = tl.split(words)
            words_0, words_2 = tl.split(low)
            words_1, words_3 = tl.split(high)
            one, two = (words_0, words_1), (words_2, words_3)
        low, low_bits = encode_two(
            STRIP, arguments, one, encode_scale, row_ptr, stride_row, m, k, M, K, i,
            FP8, MAX_BITS, POW2, ROW, STRIPS, KEEP,
        )  # fmt: skip
        high, high_bits = encode_two(
            STRIP, arguments, two, encode_scale, row_ptr, stride_row, m, k, M, K, i + 2,
            FP8, MAX_BITS, POW2, ROW, STRIPS, KEEP,
        )  # fmt: skip
        return low | (high << 16), tl.permute(tl.join(low_bits, high_bits), (0, 2, 1))
    else:
        one, two = words, words
        if KEEP:
            one, two = tl.split(words)
        x, x_bits = encode(
            STRIP, arguments, one, encode_scale, row_ptr, stride_row, m, k, M, K, i, 2 * STEP,
            FP8, MAX_BITS, POW2, ROW, STRIPS, KEEP,
        )  # fmt: skip
        y, y_bits = encode(
            STRIP, arguments, two, encode_scale, row_ptr, stride_row, m, k, M, K, i + STEP, 2 * STEP,
            FP8, MAX_BITS, POW2, ROW, STRIPS, KEEP,
        )  # fmt: skip
        return tl.join(x, y), tl.join(x_bits, y_bits)


@triton.jit
def store_transposed(words, qdata_ptr, stride_qk, m, k, K):
    """Store the words of all strips [rows, 128, 2, ...] transposed, in qdata [K, M]; its rows are stored whole."""
    cols, rows = tl.arange(0, 128)[:, None], tl.arange(0, 32)[None, :]
    qdata_ptr = (qdata_ptr + k * stride_qk + m).to(tl.pointer_type(tl.int32), bitcast=True)
    words = tl.permute(tl.reshape(words, [words.shape[0], 128, 32 // words.shape[0]]), (1, 0, 2))
    offsets = cols.to(tl.int64) * (stride_qk // 4) + rows
    tl.store(qdata_ptr + offsets, tl.reshape(words, [128, 32]), mask=cols < (K - k).to(tl.int32))


@triton.jit
def store_copies(
    STRIP: tl.constexpr, arguments, measured, m, k, M, K,
    row_ptr, row_scale_ptr, col_ptr, col_scale_ptr, stride_row, stride_row_scale, stride_col, stride_col_scale,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr, ROW: tl.constexpr, STRIPS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Write the column copy of a tile that was measured and, if ROW, its row copy."""
    scale_inv, encode_scale = column_scales(measured[0], measured[1], MAX_BITS, COL_POW2, KEEP)
    cols = tl.arange(0, 128)
    tl.store(col_scale_ptr + m // 128 * stride_col_scale + k + cols, scale_inv, mask=cols < (K - k).to(tl.int32))
    words, amax_bits = encode(
        STRIP, arguments, measured[2], encode_scale[None, :], row_ptr, stride_row, m, k, M, K, 0, 4,
        col_ptr.dtype.element_ty, MAX_BITS, ROW_POW2, ROW, STRIPS, KEEP,
    )  # fmt: skip
    store_transposed(words, col_ptr, stride_col, m, k, K)
    if ROW:
        store_row_scales(amax_bits, row_scale_ptr, stride_row_scale, m, k, M, STRIPS, MAX_BITS, ROW_POW2)


@triton.jit
def store_tile(
    STRIP: tl.constexpr, arguments,  # STRIP(*arguments, i, m, k, M, K, STRIPS): strip i of a tile, fp32, zero outside
    again,  # arguments of STRIP in the second pass
    zero,  # 0, which the compiler must not know; see measured_strip
    m, k, M, K,  # the corner of the tile, int64; the sizes of the matrix
    row_ptr, row_scale_ptr, col_ptr, col_scale_ptr, stride_row, stride_row_scale, stride_col, stride_col_scale,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr,
    STRIPS: tl.constexpr,
    KEEP: tl.constexpr,  # keep the strips, which BF16 must hold, between the two passes; else call STRIP again
):  # fmt: skip
    """Write the copies of a tile that are asked for: one pass for the scales of the columns, one for the codes."""
    if COL:
        measured = measure(STRIP, arguments, zero, m, k, M, K, 0, 4, STRIPS, KEEP)
        store_copies(
            STRIP, again, measured, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
            stride_row, stride_row_scale, stride_col, stride_col_scale, MAX_BITS, ROW_POW2, COL_POW2, ROW, STRIPS, KEEP,
        )  # fmt: skip
    else:
        x = four_strips(STRIP, arguments, 0, m, k, M, K, 4)
        low = tl.join(
            store_row_codes(x[0], zero, row_ptr, stride_row, 0, m, k, M, K, MAX_BITS, ROW_POW2, 4, False),
            store_row_codes(x[1], zero, row_ptr, stride_row, 1, m, k, M, K, MAX_BITS, ROW_POW2, 4, False),
        )
        high = tl.join(
            store_row_codes(x[2], zero, row_ptr, stride_row, 2, m, k, M, K, MAX_BITS, ROW_POW2, 4, False),
            store_row_codes(x[3], zero, row_ptr, stride_row, 3, m, k, M, K, MAX_BITS, ROW_POW2, 4, False),
        )
        amax_bits = tl.permute(tl.join(low, high), (0, 2, 1))
        store_row_scales(amax_bits, row_scale_ptr, stride_row_scale, m, k, M, 4, MAX_BITS, ROW_POW2)


@triton.jit
def losses(x, encode_scale, inside, FP8: tl.constexpr, MAX_BITS: tl.constexpr):
    """Of 32 rows of a strip: bits of the finite amax [32]; flushed, saturated, non-finite counts [32], 10 bits each."""
    bits, scaled = magnitude_bits(x), encode_scale * x
    finite = inside & (bits < INF_BITS)
    codes = scaled.to(FP8).to(tl.uint8, bitcast=True)
    flushed = finite & (bits != 0) & ((codes & 0x7F) == 0)  # a zero stays zero, whatever its sign
    # an fp32 scale, rounded twice, takes amax up to 4 ulp beyond the maximum
    saturated = finite & (magnitude_bits(scaled) > MAX_BITS + 4) & (magnitude_bits(scaled) < INF_BITS)
    nonfinite = inside & (bits >= INF_BITS)
    counts = flushed.to(tl.int32) | (saturated.to(tl.int32) << 10) | (nonfinite.to(tl.int32) << 20)
    return tl.max(tl.where(finite, bits, 0), axis=1), tl.sum(counts, axis=1)


@triton.jit
def add_statistics(stats_ptr, amax_bits, counts, m, k, M, K):
    """Add the losses of a tile at (m, k) to stats [5] int64, in the order of STATISTICS."""
    tl.atomic_max(stats_ptr, tl.max(amax_bits).to(tl.int64))
    tl.atomic_add(stats_ptr + 1, tl.sum(counts & 0x3FF).to(tl.int64))
    tl.atomic_add(stats_ptr + 2, tl.sum((counts >> 10) & 0x3FF).to(tl.int64))
    tl.atomic_add(stats_ptr + 3, tl.sum(counts >> 20).to(tl.int64))
    tl.atomic_add(stats_ptr + 4, tl.minimum(M - m, 128) * tl.minimum(K - k, 128))
