"""The numeric contract once more, in numpy and from tables written by hand: shares no code with fp8train.

Codes are found by looking a number up among the midpoints of neighbouring values, in FP64, where each of these is
exact. Scales are rounded up with frexp instead of on the bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fp8train.quant.qtensor import QTensor

# magnitude of each code 0, 1, 2, ... in units of the smallest subnormal; one line an exponent
E4M3_UNITS = """
0 1 2 3 4 5 6 7
8 9 10 11 12 13 14 15
16 18 20 22 24 26 28 30
32 36 40 44 48 52 56 60
64 72 80 88 96 104 112 120
128 144 160 176 192 208 224 240
256 288 320 352 384 416 448 480
512 576 640 704 768 832 896 960
1024 1152 1280 1408 1536 1664 1792 1920
2048 2304 2560 2816 3072 3328 3584 3840
4096 4608 5120 5632 6144 6656 7168 7680
8192 9216 10240 11264 12288 13312 14336 15360
16384 18432 20480 22528 24576 26624 28672 30720
32768 36864 40960 45056 49152 53248 57344 61440
65536 73728 81920 90112 98304 106496 114688 122880
131072 147456 163840 180224 196608 212992 229376
"""
E5M2_UNITS = """
0 1 2 3
4 5 6 7
8 10 12 14
16 20 24 28
32 40 48 56
64 80 96 112
128 160 192 224
256 320 384 448
512 640 768 896
1024 1280 1536 1792
2048 2560 3072 3584
4096 5120 6144 7168
8192 10240 12288 14336
16384 20480 24576 28672
32768 40960 49152 57344
65536 81920 98304 114688
131072 163840 196608 229376
262144 327680 393216 458752
524288 655360 786432 917504
1048576 1310720 1572864 1835008
2097152 2621440 3145728 3670016
4194304 5242880 6291456 7340032
8388608 10485760 12582912 14680064
16777216 20971520 25165824 29360128
33554432 41943040 50331648 58720256
67108864 83886080 100663296 117440512
134217728 167772160 201326592 234881024
268435456 335544320 402653184 469762048
536870912 671088640 805306368 939524096
1073741824 1342177280 1610612736 1879048192
2147483648 2684354560 3221225472 3758096384
"""
MAGNITUDES = {
    "e4m3": np.array(E4M3_UNITS.split(), dtype=np.float64) * 2.0**-9,
    "e5m2": np.array(E5M2_UNITS.split(), dtype=np.float64) * 2.0**-16,
}
NAN_CODE = 0x7F


def codes_of(values: np.ndarray, fmt: str) -> np.ndarray:
    """Bytes of finite values: nearest, ties to the even code, saturating."""
    table = MAGNITUDES[fmt]
    middle = (table[1:] + table[:-1]) / 2
    magnitude = np.abs(values.astype(np.float64))
    code = np.searchsorted(middle, magnitude, side="left")  # the lower of two where the value is their midpoint
    tie = (code < len(middle)) & (middle[np.minimum(code, len(middle) - 1)] == magnitude)
    code += tie & (code % 2 == 1)
    return (code + 128 * np.signbit(values)).astype(np.uint8)


def scales_of(amax: np.ndarray, fmt: str, kind: str) -> np.ndarray:
    """scale_inv of each block; numpy divides FP32 by FP32 as IEEE asks."""
    with np.errstate(invalid="ignore"):
        scale = amax.astype(np.float32) / np.float32(MAGNITUDES[fmt][-1])
    if kind == "pow2":
        mantissa, exponent = np.frexp(scale.astype(np.float64))
        above = np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)
        scale = np.where(scale == 0, scale, above)  # a quotient below half the smallest subnormal
    scale = np.maximum(scale, np.float32(2.0**-126))
    scale = np.where(amax == 0, np.float32(1), scale)
    return np.where(np.isfinite(amax), scale, np.float32("nan")).astype(np.float32)


def quantize_blocks(blocks: np.ndarray, fmt: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [blocks, n] and scales [blocks] of fp32 blocks [blocks, n]."""
    scale = scales_of(np.abs(blocks).max(axis=1), fmt, kind)
    bad = np.isnan(scale)
    encode_scale = np.float32(1) / np.where(bad, np.float32(1), scale)
    finite = np.where(bad[:, None], np.float32(0), blocks)
    codes = codes_of(finite * encode_scale[:, None], fmt)
    return np.where(bad[:, None], np.uint8(NAN_CODE), codes), scale


def quantize(x: Tensor, fmt: str, block: tuple[int, int], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [M, K] and scales [ceil(M/rows), ceil(K/cols)] of a matrix, block by block."""
    values = x.to(torch.float32).numpy()
    rows, cols = values.shape
    down, across = -(-rows // block[0]), -(-cols // block[1])
    padded = np.zeros((down * block[0], across * block[1]), np.float32)
    padded[:rows, :cols] = values
    blocks = padded.reshape(down, block[0], across, block[1]).swapaxes(1, 2)
    codes, scales = quantize_blocks(blocks.reshape(down * across, block[0] * block[1]), fmt, kind)
    codes = codes.reshape(blocks.shape).swapaxes(1, 2).reshape(padded.shape)
    return codes[:rows, :cols], scales.reshape(down, across)


def decoded(q: QTensor) -> np.ndarray:
    """qdata * scale_inv in FP64, exactly, NaN where the scale is."""
    table = MAGNITUDES[q.fmt]
    codes = q.qdata.view(torch.uint8).numpy()
    magnitude = table[np.minimum(codes & 0x7F, len(table) - 1)]
    value = np.where(codes & 0x80, -magnitude, magnitude)
    rows, cols = q.shape
    block = q.spec.block_shape(rows, cols)
    scale = q.scale_inv.numpy().astype(np.float64)
    scale = np.repeat(np.repeat(scale, block[0], axis=0), block[1], axis=1)[:rows, :cols]
    return np.where((codes & 0x7F) >= len(table), np.nan, value) * scale
