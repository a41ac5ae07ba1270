"""Noise in place of rounding: its size, its lack of bias, its repeatability, and that no noise changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8train.errors import RecipeError
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import evaluation_precision
from fp8train.quant import reference
from fp8train.quant.formats import BF16, FP32, GemmPrecision, LinearPrecision, QuantSpec
from fp8train.quant.noise import noisy
from fp8train.recipe import load_recipe
from tests.nn.precisions import dtypes, made, normal, run
from tests.tiny_run import tiny_train

NOISE = 0.0265
PLACEBO = LinearPrecision("noisy", noise=NOISE)
SPEC = QuantSpec.parse("e4m3 1x128")
M, N, K = 96, 64, 300


def error(x: Tensor, made_of: Tensor) -> Tensor:
    return (made_of - x.float()) / x.float()


@dtypes
@pytest.mark.parametrize("sizes", [(512, 768), (4096, 64), (64, 4096)], ids=["layer", "tall", "flat"])
def test_noise_has_the_size_asked_for_and_no_bias(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    x = normal(*sizes, dtype=dtype)
    e = error(x, noisy(x, NOISE, torch.float32)).double()
    count = e.numel()
    assert e.square().mean().sqrt().item() == pytest.approx(NOISE, rel=5 / count**0.5)  # u^2 has a std of 0.9
    assert abs(e.mean().item()) < 5 * NOISE / count**0.5  # five standard errors of a mean of `count` draws
    assert e.abs().max().item() <= NOISE * 3**0.5 * (1 + 2**-8)  # u is in [-1, 1], kept in BF16


def test_rows_and_columns_have_noise_of_their_own() -> None:
    e = error(x := normal(256, 256), noisy(x, NOISE, torch.float32)).double()
    for table in (e, e.T):
        off = torch.corrcoef(table) - torch.eye(256, dtype=torch.float64)
        assert off.square().mean().sqrt().item() == pytest.approx(256**-0.5, rel=0.05)  # of independent draws


def test_noise_of_a_row_depends_on_that_row_alone() -> None:
    x = normal(64, 300, dtype=torch.bfloat16)
    whole = noisy(x, NOISE, torch.bfloat16)
    assert torch.equal(noisy(x[10:20], NOISE, torch.bfloat16), whole[10:20])
    other = x.clone()
    other[3] += 1
    again = noisy(other, NOISE, torch.bfloat16)
    assert torch.equal(again[4:], whole[4:]) and not torch.equal(again[3], noisy(x, NOISE, torch.bfloat16)[3])


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (1, 1), (3, 5)], ids=["no rows", "no columns", "one", "small"])
def test_any_size_is_served(sizes: tuple[int, int]) -> None:
    assert noisy(normal(*sizes), NOISE, torch.bfloat16).shape == sizes


def test_non_finite_values_are_not_laundered() -> None:
    x = normal(4, 8)
    x[0, 0], x[1, 1], x[2] = float("nan"), float("inf"), 0.0
    y = noisy(x, NOISE, torch.float32)
    assert y[0, 0].isnan() and not y[1, 1].isfinite() and y[2].abs().max() == 0


@pytest.mark.parametrize("block", ["1x128", "128x128"], ids=["x and dy", "w"])
def test_recipe_carries_the_rounding_error_of_blockwise(block: str) -> None:
    x = normal(1024, 1024)
    rounded = reference.quantize(x, QuantSpec.parse(f"e4m3 {block}")).dequantize()
    rms = float((rounded - x).norm() / x.norm())
    noise = load_recipe("placebo").precisions["noisy"].noise
    assert rms == pytest.approx(noise, rel=0.01)  # a million elements: the spread of rms is 0.1 %


@dtypes
def test_three_gemms_read_noisy_operands(dtype: torch.dtype) -> None:
    linear, x, dy = made(M, N, K, PLACEBO), normal(M, K, seed=1, dtype=dtype), normal(M, N, seed=2, dtype=dtype)
    got = run(linear, x, dy)
    w = linear.weight.detach()
    nx, nw, ndy = (noisy(t, NOISE, torch.bfloat16).double() for t in (x, w, dy))
    assert linear.bias is not None and got.dx is not None and got.dw is not None
    y = (nx @ nw.T + linear.bias.double()).detach()
    # FP32 sums and, in BF16, one rounding of the result: 2^-9 of an element, 2^-8 with room for both
    for mine, wanted in ((got.y, y), (got.dx, ndy @ nw), (got.dw, ndy.T @ nx)):
        assert float((mine.double() - wanted).norm() / wanted.norm()) < 2**-8
    plain = run(made(M, N, K, BF16), x, dy)
    assert plain.dw is not None
    ratio = float((got.dw - plain.dw).norm() / plain.dw.norm())
    assert ratio == pytest.approx(NOISE * 2**0.5, rel=0.1)  # two operands, each with NOISE


def test_same_input_gives_the_same_bits_again() -> None:
    linear, x, dy = made(M, N, K, PLACEBO), normal(M, K, seed=1), normal(M, N, seed=2)
    first, second = run(linear, x, dy), run(linear, x.clone(), dy)
    assert torch.equal(first.y, second.y) and first.dw is not None and second.dw is not None
    assert torch.equal(first.dw, second.dw)


@pytest.mark.parametrize("base", [BF16, FP32], ids=["bf16", "fp32"])
def test_without_noise_the_bits_are_those_of_plain_precision(base: LinearPrecision) -> None:
    x, dy = normal(M, K, seed=1), normal(M, N, seed=2)
    plain, none = (run(made(M, N, K, p), x, dy) for p in (base, replace(base, name="other", noise=0.0)))
    assert torch.equal(plain.y, none.y) and plain.dx is not None and none.dx is not None and none.dw is not None
    assert torch.equal(plain.dx, none.dx) and plain.dw is not None and torch.equal(plain.dw, none.dw)


def test_fp32_operands_take_noise_too() -> None:
    x, dy = normal(M, K, seed=1), normal(M, N, seed=2)
    linear = made(M, N, K, replace(FP32, name="noisy", noise=NOISE))
    wanted = noisy(x, NOISE, torch.float32).double() @ noisy(linear.weight.detach(), NOISE, torch.float32).double().T
    got = run(linear, x, dy).y.double() - linear.bias.detach().double()  # type: ignore[union-attr]
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5  # FP32 sums over K=300 and the bias taken off again


def test_only_operands_in_high_precision_take_noise() -> None:
    mixed = LinearPrecision("mixed", fprop=GemmPrecision(SPEC, SPEC), noise=NOISE)
    clean = replace(mixed, noise=0.0)
    x, dy = normal(M, K, seed=1), normal(M, N, seed=2)
    one, two = run(made(M, N, K, mixed), x, dy), run(made(M, N, K, clean), x, dy)
    assert torch.equal(one.y, two.y) and one.dw is not None and two.dw is not None and not torch.equal(one.dw, two.dw)


def test_weights_in_their_next_step_and_evaluation_in_bf16_are_followed() -> None:
    linear, x = made(M, N, K, PLACEBO), normal(M, K)
    before = linear(x)
    with torch.no_grad():
        linear.weight.mul_(1.5)
    assert not torch.equal(linear(x), before)
    plain = Float8Linear.from_linear(linear, BF16, "cpu")
    with evaluation_precision(torch.nn.Sequential(linear), BF16):
        assert torch.equal(linear(x), plain(x))


def test_compiled_linear_equals_the_eager_one() -> None:
    linear, x, dy = made(M, N, K, PLACEBO), normal(M, K), normal(M, N, seed=2)
    eager, compiled = run(linear, x, dy), run(torch.compile(linear, backend="aot_eager"), x, dy)  # type: ignore[arg-type]
    assert torch.equal(eager.y, compiled.y) and eager.dw is not None and compiled.dw is not None
    assert torch.equal(eager.dw, compiled.dw)


def test_recipe_document_keeps_the_noise() -> None:
    recipe = load_recipe("placebo")
    shapes = {"layers.0.mlp.up_proj": (8, 8), "lm_head": (8, 8)}
    chosen = recipe.resolve(shapes, {"lm_head": "Decoder.keep_high_precision"})
    assert chosen["layers.0.mlp.up_proj"].precision.noise == NOISE and chosen["lm_head"].precision == BF16
    assert chosen["layers.0.mlp.up_proj"].precision.describe("fprop") == "bf16 with 2.65 % noise"
    assert load_recipe(recipe.document).hash == recipe.hash != load_recipe("bf16").hash


@pytest.mark.parametrize("value", ["high", True, -0.1, 0.5, [0.1]], ids=["word", "bool", "negative", "large", "list"])
def test_noise_that_is_no_share_is_refused(value: object) -> None:
    document = {"version": 1, "precisions": {"n": {"noise": value}}, "rules": [{"match": "*", "use": "n"}]}
    with pytest.raises(RecipeError, match=r"precisions\.n.*noise is"):
        load_recipe(document)


def test_resumed_run_and_recomputed_activations_see_the_same_noise(tmp_path: Path) -> None:
    constant = ("recipe=placebo", "optim=adamw_constant")  # a learning rate that does not depend on the last step
    whole = tiny_train(tmp_path, *constant, run="whole")
    tiny_train(tmp_path, *constant, "steps=3", run="parts")
    parts = tiny_train(tmp_path, *constant, run="parts")
    recomputed = tiny_train(tmp_path, *constant, "activation_checkpointing=full", run="recomputed")
    plain = tiny_train(tmp_path, "recipe=bf16", "optim=adamw_constant", run="plain")
    assert parts.final_train_loss == whole.final_train_loss == recomputed.final_train_loss != plain.final_train_loss
    assert whole.fp8_flops_share == 0.0
