"""Precisions, shapes and measures that tests of linears share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.config import load_config
from fp8train.models import Decoder, build_model, initialize
from fp8train.nn.linear import Float8Linear
from fp8train.quant import reference
from fp8train.quant.formats import BF16, BLOCKWISE, FP32, GemmPrecision, LinearPrecision, QuantSpec


def gemm(left: str | None, right: str | None, scale: str = "pow2") -> GemmPrecision:
    return GemmPrecision(*(None if text is None else QuantSpec.parse(text, scale) for text in (left, right)))


X, W, DY_E5M2 = "e4m3 1x128", "e4m3 128x128", "e5m2 1x128"
TENSORWISE = LinearPrecision("tensorwise", *[gemm("e4m3 tensor", "e4m3 tensor", "fp32")] * 3)
PRECISIONS = {
    "blockwise": BLOCKWISE,
    "fp32-scales": LinearPrecision("fp8", gemm(X, W, "fp32"), gemm(X, W, "fp32"), gemm(X, X, "fp32")),
    "requant": replace(BLOCKWISE, wgrad_source="requant"),
    "requant-fp32-scales": LinearPrecision(
        "fp8", gemm(X, W, "fp32"), gemm(X, W, "fp32"), gemm(X, X, "fp32"), wgrad_source="requant"
    ),
    "gradients-in-e5m2": LinearPrecision("hybrid", gemm(X, W), gemm(DY_E5M2, W), gemm(DY_E5M2, X)),
    "tensorwise": TENSORWISE,
    "rowwise-wgrad-bf16": LinearPrecision("row", gemm("e4m3 row", "e4m3 row"), gemm("e4m3 row", "e4m3 row")),
    "1x32": LinearPrecision("mx", *[gemm("e4m3 1x32", "e4m3 1x32")] * 3),
    "fprop-only": LinearPrecision("fprop", fprop=gemm(X, W)),
    "dgrad-only": LinearPrecision("dgrad", dgrad=gemm(X, W)),
    "wgrad-only": LinearPrecision("wgrad", wgrad=gemm(X, X)),
    "weight-only": LinearPrecision("w", fprop=gemm(None, W), dgrad=gemm(None, W)),
    "input-only": LinearPrecision("x", fprop=gemm(X, None), wgrad=gemm(None, X)),
    "fp8-beside-fp32": replace(BLOCKWISE, name="fp8", wgrad=GemmPrecision(), high=torch.float32),
    "bf16": BF16,
    "fp32": FP32,
}
precisions = pytest.mark.parametrize("precision", list(PRECISIONS.values()), ids=list(PRECISIONS))

LINEARS = {
    "one-block": (128, 128, 128),
    "ragged": (150, 100, 300),
    "one-row": (1, 64, 130),
    "small": (5, 3, 7),
    "no-rows": (0, 64, 130),
}
"""M, N, K."""
linears = pytest.mark.parametrize(("M", "N", "K"), list(LINEARS.values()), ids=list(LINEARS))
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@dataclass(kw_only=True, slots=True)
class Pass:
    """Output of a linear and its gradients."""

    y: Tensor
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None = None


def run(linear: Float8Linear, x: Tensor, dy: Tensor) -> Pass:
    """Forward and backward; gradients of the linear are taken out of it."""
    x = x.detach().requires_grad_(True)
    y = linear(x)
    y.backward(dy.to(y.dtype))
    result = Pass(y=y.detach(), dx=x.grad, dw=linear.weight.grad, db=None if linear.bias is None else linear.bias.grad)
    linear.zero_grad(set_to_none=True)
    return result


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Results and gradients by name: the same ones, each the same numbers."""
    assert one.keys() == other.keys() and one
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def made(M: int, N: int, K: int, precision: LinearPrecision, *, seed: int = 0, **options: Any) -> Float8Linear:
    """A linear with N(0, 1/K) weights and N(0, 1) bias."""
    linear = Float8Linear(K, N, precision=precision, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(N, K, generator=generator) * max(K, 1) ** -0.5)
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(N, generator=generator))
    linear.refresh_weight()
    return linear


def normal(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(left: Tensor, right: Tensor, specs: GemmPrecision, high: torch.dtype, **options: Any) -> Tensor:
    """left @ right.T as the precision defines it, from high-precision matrices, summed in FP64 and rounded to FP32."""
    if specs.left is not None and specs.right is not None:
        qa, qb = reference.quantize(left, specs.left), reference.quantize(right, specs.right)
        return reference.scaled_mm(qa, qb, **options)
    rounded = [
        x.to(high) if spec is None else reference.quantize(x, spec).dequantize(high)
        for x, spec in ((left, specs.left), (right, specs.right))
    ]
    y = (rounded[0].double() @ rounded[1].double().T).float()
    bias = options.get("bias")
    return (y if bias is None else y + bias).to(options.get("out_dtype", torch.bfloat16))


def defined(linear: Float8Linear, x: Tensor, dy: Tensor) -> Pass:
    """The three products by hand from quant.reference: shares nothing with nn/ but the specifications."""
    p, w = linear.precision, linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    x_for_wgrad = x
    if p.wgrad_source == "requant":
        assert p.fprop.left is not None
        x_for_wgrad = reference.quantize(x, p.fprop.left).dequantize()
    return Pass(
        y=product(x, w, p.fprop, p.high, bias=bias, out_dtype=x.dtype),
        dx=product(dy, w.T.contiguous(), p.dgrad, p.high, out_dtype=x.dtype),
        dw=product(dy.T, x_for_wgrad.T, p.wgrad, p.high, out_dtype=torch.float32),
        db=None if bias is None else dy.float().sum(0),
    )


def tiny_model() -> Decoder:
    """Two layers of width 128."""
    sizes = ["model.num_layers=2", "model.hidden_size=128", "model.intermediate_size=256", "model.num_heads=2"]
    config = load_config(["experiment=null", *sizes, "model.num_kv_heads=2"], "test")
    model = build_model(config.model)
    initialize(model, 1)
    return model
