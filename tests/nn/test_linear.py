"""Float8Linear against the definition composed by hand, and its behaviour as an nn.Linear."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import fp8train
from fp8train.backends.coverage import COUNTS, GemmCount
from fp8train.errors import BackendError
from fp8train.nn import operands
from fp8train.nn.inputs import QuantizedInput
from fp8train.nn.linear import Float8Linear
from fp8train.nn.operands import quantized_both
from fp8train.quant import reference
from fp8train.quant.formats import BF16, BLOCKWISE, FP32, LinearPrecision, QuantSpec
from tests.nn.precisions import PRECISIONS, defined, dtypes, linears, made, normal, precisions, run
from tests.quant.test_reference_gemm import calc_diff


def sqnr_db(y: Tensor, expected: Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (y.float() - expected).norm()))


@precisions
@linears
@dtypes
def test_output_and_gradients_are_those_of_the_definition_bit_for_bit(
    precision: LinearPrecision, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    bias = dtype is torch.bfloat16
    linear = made(M, N, K, precision, backend="reference", bias=bias)
    x, dy = normal(M, K, dtype=dtype), normal(M, N, seed=1, dtype=dtype)
    result, expected = run(linear, x, dy), defined(linear, x, dy)
    for name in ("y", "dx", "dw"):
        got, want = getattr(result, name), getattr(expected, name)
        assert got.dtype is want.dtype and torch.equal(got, want), name
    if bias:
        # a sum of M numbers in FP32 in any order
        assert torch.allclose(result.db, expected.db, rtol=0, atol=M * 2.0**-24 * float(dy.abs().sum(0).max()) + 0.0)


@precisions
@linears
@dtypes
def test_cpu_backends_agree_with_the_definition_up_to_the_order_of_sums(
    precision: LinearPrecision, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    x, dy = normal(M, K, dtype=dtype), normal(M, N, seed=1, dtype=dtype)
    made_by = {backend: made(M, N, K, precision, backend=backend) for backend in ("cpu", "cpu_torch")}
    expected = defined(made_by["cpu"], x, dy)
    for backend, linear in made_by.items():
        result = run(linear, x, dy)
        # FP32: 300 additions of 2^-24 / sqrt(3) rms are 6e-7 relative, calc_diff 2e-13; BF16: at worst 1.66e-3^2 / 2
        for name in ("y", "dx", "dw"):
            got, want = getattr(result, name), getattr(expected, name)
            assert got.dtype is want.dtype, (backend, name)
            assert calc_diff(got, want) < (1e-12 if got.dtype is torch.float32 else 1.5e-6), (backend, name)


@pytest.mark.parametrize(
    ("name", "floor"),
    [("blockwise", 27), ("fp32-scales", 27), ("tensorwise", 27), ("requant", 27), ("gradients-in-e5m2", 23)],
)
def test_signal_to_noise_against_an_fp32_linear(name: str, floor: float) -> None:
    # STYLE: rounding of N(0,1) gives 31.6 dB (E4M3) and 25.6 dB (E5M2) an operand, 28.5 and 24.6 dB a GEMM; less 1.5
    linear = made(512, 384, 512, PRECISIONS[name], bias=False)
    x, dy = normal(512, 512), normal(512, 384, seed=1)
    plain = nn.Linear(512, 384, bias=False)
    plain.weight = nn.Parameter(linear.weight.detach().clone())
    xp = x.clone().requires_grad_(True)
    y = plain(xp)
    y.backward(dy)
    result = run(linear, x, dy)
    assert sqnr_db(result.y, y.detach()) >= (27 if floor == 23 else floor)  # fprop is E4M3 in all
    assert sqnr_db(result.dx, xp.grad) >= floor
    assert sqnr_db(result.dw, plain.weight.grad) >= floor
    assert sqnr_db(result.y, y.detach()) < 40  # it was rounded to FP8 indeed


@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad"])
def test_each_gemm_follows_its_own_precision_and_no_other(name: str) -> None:
    x, dy = normal(150, 300), normal(150, 100, seed=1)
    plain = run(made(150, 100, 300, BF16), x, dy)
    one = run(made(150, 100, 300, PRECISIONS[f"{name}-only"]), x, dy)
    changed = {gemm for gemm in ("y", "dx", "dw") if not torch.equal(getattr(one, gemm), getattr(plain, gemm))}
    assert changed == {{"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[name]}


def test_gradient_of_the_bias_is_the_sum_of_dy_in_fp32() -> None:
    linear = made(4096, 8, 16, BLOCKWISE)
    dy = torch.full((4096, 8), 1.0, dtype=torch.bfloat16)
    assert torch.equal(run(linear, normal(4096, 16, dtype=torch.bfloat16), dy).db, torch.full((8,), 4096.0))


@dtypes
@pytest.mark.parametrize("lead", [(), (0,), (1,), (5,), (2, 3), (2, 1, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions_are_those_of_the_input(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    x = normal(*lead, 130, dtype=dtype)
    dy = normal(*lead, 40, seed=1, dtype=dtype)
    result = run(linear, x, dy)
    rows = math.prod(lead)
    flat = run(linear, x.reshape(rows, 130), dy.reshape(rows, 40))
    assert result.y.shape == (*lead, 40) and result.dx.shape == x.shape and result.y.dtype is result.dx.dtype is dtype
    for name in ("y", "dx", "dw", "db"):
        assert torch.equal(getattr(result, name).flatten(), getattr(flat, name).flatten()), name


def test_output_with_leading_dimensions_is_of_one_node_and_may_be_written_in_place() -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    x, dy = normal(2, 3, 130).requires_grad_(True), normal(2, 3, 40, seed=1)
    y = linear(x)
    inputs = [node.variable for node, _ in y.grad_fn.next_functions if node is not None]
    assert len(inputs) == 3 and all(a is b for a, b in zip(inputs, (x, linear.weight, linear.bias), strict=True))
    y += 1
    y.backward(dy)
    assert torch.equal(x.grad, run(linear, x.detach(), dy).dx)


def test_eager_code_skips_the_dispatcher_unless_a_mode_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    direct: list[str] = []
    for name in ("quantize_dual", "scaled_mm"):
        kept = getattr(operands, name)
        monkeypatch.setattr(operands, name, lambda *args, name=name, kept=kept: (direct.append(name), kept(*args))[1])

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    linear, x, seen = made(1, 40, 130, BLOCKWISE), normal(6, 130).requires_grad_(True), []
    linear(x).sum().backward()
    assert sorted(direct) == ["quantize_dual"] * 2 + ["scaled_mm"] * 3
    direct.clear()
    linear.inputs.clear()
    with Watch():
        linear(x).sum().backward()
    assert direct == [] and sum(name.startswith("fp8train.") for name in seen) == 5


def test_transforms_of_torch_func_are_refused() -> None:
    linear, x = made(1, 40, 130, BLOCKWISE), normal(6, 130)
    for call in (
        lambda: torch.func.vmap(lambda factor: linear(x) * factor)(torch.ones(3)),
        lambda: torch.func.grad(lambda x: linear(x).sum())(x),
        lambda: torch.func.jvp(linear, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="a transform of torch.func .* is active; needs autograd"):
            call()
    assert torch.equal(torch.func.functional_call(linear, dict(linear.named_parameters()), (x,)), linear(x))


@precisions
def test_without_tokens_the_weight_gradient_is_allocated_and_zero(precision: LinearPrecision) -> None:
    # a data-parallel reduction waits for every parameter's gradient
    result = run(made(0, 40, 130, precision), normal(0, 130), normal(0, 40))
    assert result.dw.shape == (40, 130) and not result.dw.any() and result.dw.dtype is torch.float32
    assert not result.db.any()


@pytest.mark.parametrize(("N", "K"), [(0, 130), (40, 0), (1, 1)], ids=str)
def test_empty_or_single_features_are_served(N: int, K: int) -> None:
    linear = made(6, N, K, BLOCKWISE)
    result = run(linear, normal(2, 3, K), normal(2, 3, N))
    assert result.y.shape == (2, 3, N) and result.dx.shape == (2, 3, K) and result.dw.shape == (N, K)
    if K == 0:
        assert torch.equal(result.y, linear.bias.detach().expand(2, 3, N))


def test_input_that_is_not_contiguous_gives_the_result_of_its_copy() -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    for x in (normal(130, 6).T, normal(6, 260)[:, ::2], normal(2, 130, 3).transpose(1, 2)):
        dy = normal(*x.shape[:-1], 40, seed=1)
        strided, dense = run(linear, x, dy), run(linear, x.contiguous(), dy)
        assert torch.equal(strided.y, dense.y) and torch.equal(strided.dx, dense.dx)
        assert torch.equal(strided.dw, dense.dw)


def test_gradient_that_is_not_contiguous_gives_the_result_of_its_copy() -> None:
    linear = made(6, 40, 130, BLOCKWISE)
    x = normal(6, 130)
    for dy in (normal(40, 6).T, torch.tensor(0.5).expand(6, 40)):
        assert torch.equal(run(linear, x, dy).dw, run(linear, x, dy.contiguous()).dw)


@precisions
def test_autocast_decides_the_dtype_of_the_output_and_nothing_else(precision: LinearPrecision) -> None:
    # the matmuls inside the operators must not be cast: their FP32 sums would be rounded to BF16
    linear = made(5, 40, 130, precision)
    x = normal(5, 130).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype is torch.float32 and linear.weight.grad.dtype is torch.float32
    assert torch.equal(y.detach(), linear(x.detach()).to(torch.bfloat16))


def test_autocast_in_fp16_is_refused() -> None:
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="autocast.*float16.*bfloat16"):
        made(5, 40, 130, BLOCKWISE)(normal(5, 130))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 129), r"x is \[5, 129\]; needs \[..., 130\]"),
        (torch.tensor(1.0), r"x is \[\]; needs"),
        (torch.zeros(5, 130, dtype=torch.float16), "x is torch.float16; needs"),
        (torch.zeros(5, 130, dtype=torch.int64), "x is torch.int64; needs"),
    ],
    ids=["features", "scalar", "fp16", "int64"],
)
def test_input_that_does_not_fit_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"Float8Linear: {message}"):
        made(5, 40, 130, BLOCKWISE)(x)


def test_unknown_backend_is_refused_when_the_layer_is_made() -> None:
    with pytest.raises(BackendError, match="needs one of"):
        Float8Linear(8, 8, backend="triton9")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weight_that_is_no_fp32_master_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="weight is torch.* needs torch.float32"):
        Float8Linear.from_linear(nn.Linear(8, 8, dtype=dtype), BLOCKWISE, "cpu")
    cast = made(1, 8, 8, BLOCKWISE).to(dtype)
    with pytest.raises(ValueError, match="weight is torch.* needs torch.float32"):
        cast(normal(2, 8))


def test_frozen_weight_makes_no_column_copy_and_no_wgrad(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = made(5, 40, 130, BLOCKWISE)
    linear.weight.requires_grad_(False)
    COUNTS.reset()
    saved = []
    x = normal(5, 130).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = linear(x)
    y.sum().backward()
    assert (130, 5) not in saved  # the column copy of x
    assert linear.weight.grad is None and x.grad is not None and linear.bias.grad is not None
    assert set(COUNTS.snapshot()[linear.site]) == {"fprop", "dgrad"}


def test_input_without_gradient_skips_dgrad_and_its_weight_copy() -> None:
    linear = made(5, 40, 130, BLOCKWISE)
    COUNTS.reset()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = linear(normal(5, 130))
    y.sum().backward()
    assert set(COUNTS.snapshot()[linear.site]) == {"fprop", "wgrad"} and linear.weight.grad is not None
    assert (130, 40) not in saved  # w.T


def test_only_the_bias_may_be_trainable() -> None:
    linear = made(5, 40, 130, BLOCKWISE)
    linear.weight.requires_grad_(False)
    linear(normal(5, 130)).sum().backward()
    assert torch.equal(linear.bias.grad, torch.full((40,), 5.0)) and linear.weight.grad is None


def test_no_grad_forward_saves_nothing_and_gives_the_same_numbers() -> None:
    linear = made(5, 40, 130, BLOCKWISE)
    x = normal(5, 130)
    with torch.no_grad():
        quiet = linear(x)
    with torch.inference_mode():
        inference = linear(x)
    assert quiet.grad_fn is None
    assert torch.equal(quiet, linear(x).detach()) and torch.equal(inference, quiet)


@precisions
def test_coverage_counts_each_gemm_with_its_tokens(precision: LinearPrecision) -> None:
    linear = made(6, 40, 130, precision)
    COUNTS.reset()
    for _ in range(2):
        run(linear, normal(2, 3, 130), normal(2, 3, 40))
    counts = COUNTS.snapshot()[linear.site]
    for name, spec in precision.gemms.items():
        assert counts[name] == (GemmCount(2, 0, 12, 0) if spec.fp8 else GemmCount(0, 2, 0, 12)), name


def test_sites_are_unique_also_among_copies() -> None:
    first, second = made(1, 8, 8, BF16), made(1, 8, 8, BF16)
    third = copy.deepcopy(first)
    assert len({first.site, second.site, third.site}) == 3 and third.plan.site == third.site
    assert 0 not in (first.site, second.site)  # NOT_COUNTED


def test_printing_shows_the_precision_of_each_gemm() -> None:
    text = str(nn.Sequential(made(1, 40, 130, BLOCKWISE), made(1, 8, 40, BF16, bias=False)))
    assert "Float8Linear(130, 40, bias=True, precision=fp8 (fprop: e4m3 1x128 pow2 * e4m3 128x128 pow2" in text
    assert "wgrad: e4m3 1x128 pow2 * e4m3 1x128 pow2), backend=cpu" in text
    assert "Float8Linear(40, 8, bias=False, precision=bf16 (fprop: bf16, dgrad: bf16, wgrad: bf16)" in text


def test_from_linear_keeps_parameter_objects_mode_and_numbers() -> None:
    plain = nn.Linear(130, 40).eval()
    linear = Float8Linear.from_linear(plain, FP32, "cpu")
    assert linear.weight is plain.weight and linear.bias is plain.bias and not linear.training
    assert (linear.in_features, linear.out_features) == (130, 40) and isinstance(linear, nn.Linear)
    x = normal(5, 130)
    assert torch.allclose(linear(x), plain(x), rtol=0, atol=130 * 2.0**-24 * 8)  # |x w| sums below 8


def test_parametrised_weight_is_no_entry_of_the_parameters_and_is_served() -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    linear, x, dy = made(5, 40, 130, BLOCKWISE), normal(5, 130), normal(5, 40, seed=1)
    expected = run(linear, 2 * x, dy)  # pow2 scales: twice the weight gives twice the output
    parametrize.register_parametrization(linear, "weight", Twice())
    assert torch.equal(linear(x), expected.y)
    linear(x).backward(dy)
    assert torch.equal(linear.parametrizations.weight.original.grad, expected.dw)


def test_public_name_makes_a_blockwise_linear() -> None:
    linear = fp8train.Float8Linear(130, 40, bias=False)
    assert linear.precision == BLOCKWISE and linear.bias is None and linear.weight.dtype is torch.float32


def test_changing_the_precision_changes_the_numbers_and_back() -> None:
    linear = made(5, 40, 130, BLOCKWISE)
    x, dy = normal(5, 130), normal(5, 40, seed=1)
    first = run(linear, x, dy)
    linear.set_precision(BF16)
    other = run(linear, x, dy)
    plain = run(made(5, 40, 130, BF16), x, dy)
    assert torch.equal(other.y, plain.y) and torch.equal(other.dw, plain.dw) and not torch.equal(other.y, first.y)
    linear.set_precision(BLOCKWISE)
    assert torch.equal(run(linear, x, dy).y, first.y)


def test_quantised_input_gives_what_the_tensor_gives() -> None:
    linear = made(5, 40, 130, BLOCKWISE)
    x, dy = normal(5, 130), normal(5, 40, seed=1)
    expected = run(linear, x, dy)
    row, col = quantized_both(x, BLOCKWISE.fprop.left, BLOCKWISE.wgrad.right, torch.bfloat16, "cpu")
    carrier = x.clone().requires_grad_(True)
    y = linear(QuantizedInput(carrier, row, col))
    y.backward(dy)
    assert torch.equal(y, expected.y) and torch.equal(carrier.grad, expected.dx)
    assert torch.equal(linear.weight.grad, expected.dw)


def test_quantised_input_of_another_precision_is_refused() -> None:
    linear = made(5, 40, 130, BLOCKWISE)
    x = normal(5, 130)
    other = QuantSpec.parse("e4m3 1x32")
    row, col = quantized_both(x, other, BLOCKWISE.wgrad.right, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="QuantizedInput: row is e4m3 1x32 pow2; needs e4m3 1x128 pow2"):
        linear(QuantizedInput(x, row, col))
    row, _ = quantized_both(x, BLOCKWISE.fprop.left, BLOCKWISE.wgrad.right, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="QuantizedInput: col is None"):
        linear(QuantizedInput(x, row, None))
    linear.weight.requires_grad_(False)
    assert torch.equal(linear(QuantizedInput(x, row, None)), linear(x))


def test_requantised_and_dual_operands_differ_with_fp32_scales_only() -> None:
    # numerics.md 5.2: pow2 scales make the second rounding exact
    x, dy = normal(256, 128), normal(256, 64, seed=1)
    for name, same in (("fp32-scales", False), ("blockwise", True)):
        dual = run(made(256, 64, 128, PRECISIONS[name], backend="reference"), x, dy)
        again = replace(PRECISIONS[name], wgrad_source="requant")
        requant = run(made(256, 64, 128, again, backend="reference"), x, dy)
        assert torch.equal(dual.dw, requant.dw) == same
        assert torch.equal(dual.y, requant.y) and torch.equal(dual.dx, requant.dx)


def test_nan_in_one_token_reaches_the_weight_gradient_and_no_other_token() -> None:
    linear = made(5, 40, 130, BLOCKWISE)
    x = normal(5, 130)
    x[2, 7] = float("nan")
    result = run(linear, x, normal(5, 40, seed=1))
    assert result.y.isnan().any(1).tolist() == [False, False, True, False, False]
    assert not result.dx.isnan().any() and result.dw.isnan().any(0).nonzero().flatten().tolist() == [7]


def test_reference_quantiser_defines_the_codes_of_the_weight() -> None:
    linear = made(1, 300, 200, BLOCKWISE)
    expected = reference.quantize(linear.weight.detach(), QuantSpec.parse("e4m3 128x128"))
    linear(normal(1, 200))
    assert torch.equal(linear.w_qdata.view(torch.uint8), expected.qdata.view(torch.uint8))
    assert torch.equal(linear.wt_qdata.view(torch.uint8), expected.qdata.T.contiguous().view(torch.uint8))
    assert torch.equal(linear.wt_scale_inv, expected.scale_inv.T)
