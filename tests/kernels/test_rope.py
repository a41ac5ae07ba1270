"""Rotary embedding: the bits of the formula and of its gradient, whatever the shapes, dtypes and strides."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.kernels.rope import rope  # noqa: E402
from fp8train.models.attention import apply_rope  # noqa: E402
from tests.hardware import requires_gpu  # noqa: E402
from tests.kernels.products import DEVICE, has_remedy  # noqa: E402
from tests.source_tree import ROOT  # noqa: E402

DTYPES = [torch.bfloat16, torch.float32]
# B, heads, T, head_dim; several programs to a row in the last
SHAPES = [(2, 4, 33, 64), (1, 5, 50, 80), (2, 3, 17, 128), (3, 1, 40, 6), (1, 2, 1, 2), (1, 1, 3, 2 * 1030)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
out_dtypes = pytest.mark.parametrize("out_dtype", DTYPES, ids=["to-bf16", "to-fp32"])


def tables(T: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(T).float().outer(torch.logspace(0, -3, half))
    return angles.cos(), angles.sin()


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Of many magnitudes, as a projection gives them: [B, heads, T, head_dim] with memory [B, T, heads, head_dim]."""
    B, heads, T, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, heads, head_dim, generator=generator)
    x *= torch.exp2(torch.randint(-20, 20, x.shape, generator=generator).float())
    return x.to(dtype).transpose(1, 2)


def differing(made: Tensor, wanted: Tensor) -> int:
    """How many numbers have other bits, zeros of either sign told apart; any NaN equals any other."""
    assert made.shape == wanted.shape and made.dtype is wanted.dtype
    made, wanted = made.cpu(), wanted.cpu()
    differs = (made != wanted) | (made.signbit() != wanted.signbit())
    return int((differs & ~(made.isnan() & wanted.isnan())).sum())


def on_device(x: Tensor, dtype: torch.dtype, *, inverse: bool = False) -> Tensor:
    """What the kernel makes of x, which may lie anywhere."""
    cos, sin = (table.to(DEVICE) for table in tables(x.shape[2], x.shape[3] // 2))
    return rope(x.to(DEVICE), cos, sin, out_dtype=dtype, inverse=inverse)


def assert_formula(x: Tensor, dy: Tensor) -> None:
    """Forward and gradient have the bits of apply_rope and of autograd through it, on the CPU."""
    variable = x.clone().requires_grad_()
    wanted = apply_rope(variable, *tables(x.shape[2], x.shape[3] // 2), dy.dtype)
    wanted.backward(dy)
    assert variable.grad is not None
    assert differing(on_device(x, dy.dtype), wanted.detach()) == 0
    assert differing(on_device(dy, x.dtype, inverse=True), variable.grad) == 0


@shapes
@dtypes
@out_dtypes
def test_rotation_and_gradient_are_the_formulas(
    shape: tuple[int, ...], dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    assert_formula(numbers(shape, dtype, 1), numbers(shape, out_dtype, 2))


@shapes
def test_results_lie_as_flash_attention_reads_them(shape: tuple[int, ...]) -> None:
    for x in (numbers(shape, torch.bfloat16, 1), numbers(shape, torch.bfloat16, 1).contiguous()):
        assert on_device(x, torch.bfloat16).transpose(1, 2).is_contiguous()


@dtypes
def test_any_strides_are_read_but_the_last(dtype: torch.dtype) -> None:
    wide = numbers((3, 7, 40, 96), dtype, 1).to(DEVICE)
    views = {
        "contiguous": wide.contiguous(),
        "every-second": wide[::2, ::3, 1::2],
        "part-of-the-channels": wide[..., 8:56],
        "odd-start": wide[..., 3:85],
        "one-for-all-heads": wide[:, :1].expand(3, 5, 40, 96),
        "positions-in-reverse-batch-order": wide.permute(2, 1, 0, 3),
    }
    for name, x in views.items():
        cos, sin = (table.to(DEVICE) for table in tables(x.shape[2], x.shape[3] // 2))
        alone = rope(x.contiguous(), cos, sin, out_dtype=dtype)
        assert differing(rope(x, cos, sin, out_dtype=dtype), alone) == 0, name
        assert differing(alone, apply_rope(x, cos, sin, dtype)) == 0, name


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, where the kernel is interpreted
@dtypes
@out_dtypes
def test_zeros_infinities_and_subnormals_are_the_formulas(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Every pair of them, at angles whose cosine or sine is 0 or 1 too."""
    special = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 2.0**-126, 3e38, -3e38]
    pairs = torch.cartesian_prod(torch.tensor(special), torch.tensor(special))  # [144, 2]
    x = pairs.T.reshape(1, 1, 1, 288).expand(1, 1, 5, 288).contiguous()
    assert_formula(x.to(dtype), x.to(out_dtype))
    cos = torch.tensor([1.0, 0.0, -1.0, -0.0, 0.6])[:, None].repeat(1, 144)
    sin = torch.tensor([0.0, 1.0, -0.0, -1.0, 0.8])[:, None].repeat(1, 144)
    for inverse in (False, True):
        made = rope(x.to(DEVICE, dtype), cos.to(DEVICE), sin.to(DEVICE), out_dtype=out_dtype, inverse=inverse)
        assert differing(made, apply_rope(x.to(dtype), cos, -sin if inverse else sin, out_dtype)) == 0


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_nothing_is_rotated_where_there_is_nothing(shape: tuple[int, ...]) -> None:
    made = on_device(torch.zeros(shape, dtype=torch.bfloat16), torch.float32)
    assert made.shape == shape and made.dtype is torch.float32


@requires_gpu()
def test_offsets_are_64_bits_wide() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GB of GPU memory for a tensor of 9 GB")
    far = torch.empty(2 * 2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    x = numbers((2, 2, 2, 32), torch.bfloat16, 1).to(DEVICE)
    for strides in ((2**31 + 8, 64, 32, 1), (128, 2**31 + 8, 32, 1), (128, 64, 2**31 + 8, 1)):
        apart = far.as_strided((2, 2, 2, 32), strides).copy_(x)
        assert differing(on_device(apart, torch.bfloat16), on_device(x, torch.bfloat16)) == 0, strides


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 8)}, r"x is \[3, 4, 8\] torch.float32; needs \[B, heads, T, head_dim\]"),
        ({"x": torch.zeros(2, 3, 4, 8, dtype=torch.float16)}, "x is .* torch.float16; needs"),
        ({"x": torch.zeros(2, 3, 4, 7)}, r"x is \[2, 3, 4, 7\] .* head_dim even"),
        ({"x": torch.zeros(2, 3, 4, 16)[..., ::2]}, r"x has strides \(192, 64, 16, 2\)"),
        ({"x": torch.empty(0, 3, 4, 2**31, device="meta")}, "x is .*; needs dimensions below 2\\^31"),
        ({"x": torch.zeros(1).expand(2**20, 2**11, 4, 8)}, r"x has strides \(0, 0, 0, 0\)"),
        ({"x": torch.zeros(8).expand(2**20, 2**11, 4, 8)}, "x is .* at most 2\\^30 rows"),
        ({"cos": torch.zeros(4, 5)}, r"cos is \[4, 5\] torch.float32, .*needs \[4, 4\] torch.float32"),
        ({"sin": torch.zeros(4, 4, dtype=torch.bfloat16)}, r"sin is \[4, 4\] torch.bfloat16, .*needs"),
        ({"sin": torch.zeros(4, 4).T}, r"sin is .* strides \(1, 4\); needs .*, contiguous"),
        ({"out_dtype": torch.float16}, "out_dtype is torch.float16; needs torch.bfloat16 or torch.float32"),
    ],
    ids=["three-d", "fp16", "odd", "stride", "2^31", "stride-0", "rows", "cos", "bf16-sin", "sin-stride", "to-fp16"],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 4, 8), "cos": torch.zeros(4, 4), "sin": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=f"rope: {message}") as refused:
        rope(**({"out_dtype": torch.float32} | arguments | change))
    assert has_remedy(refused)


COMPILE = """
import json
from fp8train.kernels import rope
from tests.kernels import sm90
print(json.dumps({case[0]: sm90._disassembled(sm90.compiled(case).asm["cubin"]) for case in rope.COMPILE_CASES}))
"""


@pytest.mark.slow
def test_products_and_sums_are_not_contracted() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, sass in json.loads(done.stdout).items():
        assert sass.count(" FMUL") == 32 and sass.count(" FADD") == 16 and " FFMA" not in sass, name  # 8 pairs a thread
