"""Tiles of BF16 numbers, one, or the same one of two matrices, made in one pass and written as both copies.

Whole tiles and power-of-two scales only. Scales, codes and strips are those of tile.py, bit for bit, but two neighbours
of a row stay in one word until they are codes: one instruction takes the maximum of both, or multiplies both by such
scales, which loses nothing that a code would show. A word of row maxima holds one of each of two strips. One pass over
the strips writes the row copies, since a strip has whole blocks of them, and leaves the words; column copies are made
from these when it is done.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3. Measured: kernels/README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8train.kernels.tile import INTERPRETED, column_halves, scales, store_strip, store_transposed, unpacked

MAGNITUDES = tl.constexpr(0x7FFF7FFF)  # of words


@triton.jit
def paired(even, odd):
    """FP32 numbers rounded to BF16, as words."""
    if INTERPRETED:
        low = even.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        high = odd.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        low, high = tl.where(even == even, low, 0x7FFF), tl.where(odd == odd, high, 0x7FFF)  # NaN of the device
        return low & 0xFFFF | (high << 16)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def halves(words):
    """The even and the odd numbers of words, FP32."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def low_halves(x, y):
    """Words of the even number of x and that of y."""
    return x & 0xFFFF | (y << 16)


@triton.jit
def high_halves(x, y):
    """Words of the odd number of x and that of y."""
    return (x >> 16) & 0xFFFF | (y & -65536)


@triton.jit
def fma(x, y, z):
    """x * y + z of the numbers in words, rounded once."""
    if INTERPRETED:  # which rounds twice, but the sums here are exact
        even, odd = halves(x)
        even_y, odd_y = halves(y)
        even_z, odd_z = halves(z)
        return paired(even * even_y + even_z, odd * odd_y + odd_z)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def times(x, y):
    """Products of the numbers in words, rounded to BF16."""
    return fma(x, y, tl.full([], -0x7FFF8000, tl.int32))  # -0 changes no product, not even a zero


@triton.jit
def larger(x, y):
    """The larger magnitudes of the numbers in words, NaN if one is; their signs say nothing."""
    if INTERPRETED:
        low, high = tl.maximum(x & 0x7FFF, y & 0x7FFF), tl.maximum(x & 0x7FFF0000, y & 0x7FFF0000)
        return (x ^ y) & -0x7FFF8000 | low | high
    else:
        return tl.inline_asm_elementwise(
            "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def load_words(x_ptr, stride_xm, i, m, k, STRIPS: tl.constexpr):
    """Words [128 / STRIPS, 64] of strip i of the tile at (m, k) of x [M, K] bf16, whose rows begin where words do."""
    rows, cols = STRIPS * tl.arange(0, 128 // STRIPS), tl.arange(0, 64)
    x_ptr = (x_ptr + (m + i) * stride_xm + k).to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(x_ptr + rows.to(tl.int64)[:, None] * (stride_xm // 2) + cols[None, :])


@triton.jit
def load_halves(x_ptr, stride_xm, i, m, k, STRIPS: tl.constexpr):
    """The even and the odd numbers of such a strip, FP32, of x in bf16 or fp32.

    FP32 numbers are loaded by fours, every other four at once, so that a thread has the 8 neighbours that become the
    words that load_words would give it.
    """
    if x_ptr.dtype.element_ty == tl.bfloat16:
        return halves(load_words(x_ptr, stride_xm, i, m, k, STRIPS))
    else:
        R: tl.constexpr = 128 // STRIPS
        rows, cols = STRIPS * tl.arange(0, R), tl.arange(0, 64)
        x_ptr += (m + i) * stride_xm + k
        fours = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + (cols + cols // 4 * 4)[None, :]
        even, odd = tl.split(tl.reshape(tl.load(fours), [R, 16, 2, 2]))
        even_4, odd_4 = tl.split(tl.reshape(tl.load(fours + 4), [R, 16, 2, 2]))
        even = tl.reshape(tl.permute(tl.join(even, even_4), (0, 1, 3, 2)), [R, 64])
        return even, tl.reshape(tl.permute(tl.join(odd, odd_4), (0, 1, 3, 2)), [R, 64])


@triton.jit
def encode_words(amax, MAX_BITS: tl.constexpr):
    """What `scales` returns as encode_scale of words of magnitudes, as words: the same sums in halves of 16 bits."""
    MAX: tl.constexpr = MAX_BITS // 0x10000
    scale = (amax + (0x7F - MAX % 0x80) * 0x10001) & 0x7F807F80
    scale = larger(scale, tl.full([], (MAX // 0x80 - 126) * 0x800080, tl.int32)) - (MAX // 0x80 - 127) * 0x800080
    return fma(amax, tl.full([], 0, tl.int32), 0x7F007F00 - scale)  # NaN where amax is not finite


@triton.jit
def store_row_words(
    x, x_ptr, i, y, y_ptr, j, stride, m, k, M, K, MAX_BITS: tl.constexpr, STRIPS: tl.constexpr
):  # fmt: skip
    """Write the codes of the row copies of strip i of one tile, x, and strip j of the same or another, y.

    Returns words [128 / STRIPS] of the largest magnitudes of their rows, those of x in the low halves.
    """
    low = tl.reduce(tl.reshape(x, [x.shape[0], 16, 4]), 2, larger)
    high = tl.reduce(tl.reshape(y, [y.shape[0], 16, 4]), 2, larger)
    amax = tl.reduce(larger(low_halves(low, high), high_halves(low, high)), 1, larger) & MAGNITUDES
    encode = encode_words(amax, MAX_BITS)
    x, y = times(x, low_halves(encode, encode)[:, None]), times(y, high_halves(encode, encode)[:, None])
    store_strip(unpacked(x), x_ptr, stride, i, m, k, M, K, STRIPS)
    store_strip(unpacked(y), y_ptr, stride, j, m, k, M, K, STRIPS)
    return amax


@triton.jit
def in_order(x, i: tl.constexpr, STEP: tl.constexpr):
    """Tensors i, i + STEP, i + 2 STEP, ... of a tuple of 2^n, side by side in n last dimensions of two."""
    if STEP == len(x):
        return x[i]
    else:
        return tl.join(in_order(x, i, 2 * STEP), in_order(x, i + STEP, 2 * STEP))


@triton.jit
def scales_in_order(amax, order, MAX_BITS: tl.constexpr):
    """scale_inv [N, 2] of words [N] of magnitudes, these taken in that order.

    `gather` gives each thread one word. As they were reduced, a thread would scale those of all its rows or columns,
    which 15 other threads do too.
    """
    amax = tl.gather(amax, order, 0)
    scale_inv, _ = scales(tl.join(amax << 16, amax & -65536), MAX_BITS, True)
    return scale_inv


@triton.jit
def largest(words):
    """The largest magnitudes in each column of the strips of a tile; their signs say nothing."""
    amax = words[0]
    for i in tl.static_range(1, len(words)):
        amax = larger(amax, words[i])
    return amax


@triton.jit
def column_amax(amax):
    """Words [64] or [64, 2] of the largest magnitudes of neighbouring columns of one tile or two, from `largest`.

    A thread holds 4 neighbouring words of each: reduced in that order, 16 threads of a warp meet in a bank of shared
    memory.
    """
    rows: tl.constexpr = amax.shape[0]
    held: tl.constexpr = amax.numel // (rows * 16)
    apart = tl.reshape(tl.permute(tl.reshape(amax, [rows, 16, held]), (0, 2, 1)), [rows, 16 * held])
    together = tl.permute(tl.reshape(tl.reduce(apart, 0, larger), [held, 16]), (1, 0))
    return tl.reshape(together, amax.shape[1:]) & MAGNITUDES


@triton.jit
def store_column_words(words, encode, col_ptr, stride_col, m, k, K):
    """Write the codes of the column copy of a tile from the words of its strips and of its scales [64]."""
    codes, encode = (), encode[None, :]
    FP8: tl.constexpr = col_ptr.dtype.element_ty
    for i in tl.static_range(0, len(words), 4):
        x, y = times(words[i], encode), times(words[i + 1], encode)
        low = column_halves(unpacked(x), unpacked(y), 1.0, FP8)
        x, y = times(words[i + 2], encode), times(words[i + 3], encode)
        codes = codes + (low | (column_halves(unpacked(x), unpacked(y), 1.0, FP8) << 16),)
    store_transposed(in_order(codes, 0, 1), col_ptr, stride_col, m, k, K)


@triton.jit
def store_two_tiles(
    LOAD: tl.constexpr, arguments,  # LOAD(*arguments, i, m, k, STRIPS): words of strip i of what the tiles are made of
    MAKE: tl.constexpr,  # MAKE(*words): those of both tiles
    m, k, M, K,  # the corner of the tiles, int64, and their end: M = m + 128, K = k + 128
    row_ptr, row_scale_ptr, col_ptr, col_scale_ptr, stride_row, stride_row_scale, stride_col, stride_col_scale,
    row_gap, row_scale_gap, col_gap, col_scale_gap,  # int64, from the copies of the first matrix to the second's
    MAX_BITS: tl.constexpr, STRIPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write both copies of two tiles in the same place of two matrices."""
    loaded, x, y, rows = (), (), (), ()
    for i in tl.static_range(AHEAD):
        loaded = loaded + (LOAD(*arguments, i, m, k, STRIPS),)
    for i in tl.static_range(STRIPS):
        if i + AHEAD < STRIPS:
            loaded = loaded + (LOAD(*arguments, i + AHEAD, m, k, STRIPS),)
        first, second = MAKE(*loaded[i])
        amax = store_row_words(
            first, row_ptr, i, second, row_ptr + row_gap, i, stride_row, m, k, M, K, MAX_BITS, STRIPS
        )  # fmt: skip
        x, y, rows = x + (first,), y + (second,), rows + (amax,)
    j = tl.arange(0, 128)
    scale_inv = scales_in_order(tl.reshape(in_order(rows, 0, 1), [128]), j, MAX_BITS)
    row_scale_ptr += k // 128 * stride_row_scale + m
    tl.store(row_scale_ptr + j[:, None] + row_scale_gap * tl.arange(0, 2)[None, :], scale_inv)

    columns, tile, pair = column_amax(tl.join(largest(x), largest(y))), j // 64, j % 64
    scale_inv = scales_in_order(tl.reshape(columns, [128]), 2 * pair + tile, MAX_BITS)
    col_scale_ptr += m // 128 * stride_col_scale + k
    tl.store(col_scale_ptr + (col_scale_gap * tile + 2 * pair)[:, None] + tl.arange(0, 2)[None, :], scale_inv)
    first, second = tl.split(encode_words(columns, MAX_BITS))
    store_column_words(x, first, col_ptr, stride_col, m, k, K)
    store_column_words(y, second, col_ptr + col_gap, stride_col, m, k, K)


@triton.jit
def store_word_tile(
    LOAD: tl.constexpr, arguments,  # LOAD(*arguments, i, m, k, STRIPS): strip i of what the tile is made of, a tuple
    MAKE: tl.constexpr,  # MAKE(*those): its words
    m, k, M, K,  # the corner of the tile, int64, and its end: M = m + 128, K = k + 128
    row_ptr, row_scale_ptr, col_ptr, col_scale_ptr, stride_row, stride_row_scale, stride_col, stride_col_scale,
    MAX_BITS: tl.constexpr, STRIPS: tl.constexpr,
    AHEAD: tl.constexpr,  # strips that are loaded while others are worked on, even
):  # fmt: skip
    """Write both copies of a tile."""
    loaded, x, rows = (), (), ()
    for i in tl.static_range(AHEAD):
        loaded = loaded + (LOAD(*arguments, i, m, k, STRIPS),)
    for i in tl.static_range(0, STRIPS, 2):
        if i + AHEAD < STRIPS:
            loaded = loaded + (LOAD(*arguments, i + AHEAD, m, k, STRIPS),)
            loaded = loaded + (LOAD(*arguments, i + AHEAD + 1, m, k, STRIPS),)
        first, second = MAKE(*loaded[i]), MAKE(*loaded[i + 1])
        amax = store_row_words(first, row_ptr, i, second, row_ptr, i + 1, stride_row, m, k, M, K, MAX_BITS, STRIPS)
        x, rows = x + (first, second), rows + (amax,)
    j = tl.arange(0, 64)
    two = 2 * j[:, None] + tl.arange(0, 2)[None, :]
    scale_inv = scales_in_order(tl.reshape(in_order(rows, 0, 1), [64]), j, MAX_BITS)
    tl.store(row_scale_ptr + k // 128 * stride_row_scale + m + two, scale_inv)

    store_word_columns(x, m, k, K, col_ptr, col_scale_ptr, stride_col, stride_col_scale, MAX_BITS)


@triton.jit
def store_word_columns(
    x,  # words of the strips of the tile at (m, k), a tuple
    m, k, K, col_ptr, col_scale_ptr, stride_col, stride_col_scale, MAX_BITS: tl.constexpr,
):  # fmt: skip
    """Write the column copy of a tile."""
    j = tl.arange(0, 64)
    scale_ptrs = col_scale_ptr + m // 128 * stride_col_scale + k + 2 * j[:, None] + tl.arange(0, 2)[None, :]
    columns = column_amax(largest(x))
    tl.store(scale_ptrs, scales_in_order(columns, j, MAX_BITS))
    store_column_words(x, encode_words(columns, MAX_BITS), col_ptr, stride_col, m, k, K)
