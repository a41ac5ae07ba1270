"""One copy of a weight kept between steps, not two: the same numbers, and w.T only while backward needs it."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fp8train import convert_model
from fp8train.backends.cpu import CpuBackend
from fp8train.config import load_config
from fp8train.errors import ConfigError
from fp8train.explain import main as explain
from fp8train.metrics import read_metrics
from fp8train.nn.linear import Float8Linear
from fp8train.nn.remedies import InputRemedy
from fp8train.nn.weights import OPERANDS, LocalWeight, converted_linears, evaluation_precision, weights_changed
from fp8train.quant.formats import BF16, BLOCKWISE
from fp8train.quant.qtensor import QTensor
from tests.nn.precisions import LINEARS, PRECISIONS, made, normal, tiny_model
from tests.tiny_run import tiny_train

RECIPES = ("blockwise", "tensorwise", "rowwise", "wgrad_bf16", "placebo", "bf16")


def trained(copies: str, recipe: str, fused: str = "auto", checkpointing: str = "none", steps: int = 2) -> list[Tensor]:
    """Outputs, gradients and weights of some steps."""
    model = tiny_model()
    convert_model(model, recipe, fused=fused, weight_copies=copies)
    model.checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        y = model(torch.arange(128).view(2, 64))
        y.float().square().mean().backward()
        found += [y, *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return found + list(model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_copy_gives_the_bits_of_two(recipe: str) -> None:
    for both, one in zip(trained("both", recipe), trained("one", recipe), strict=True):
        assert torch.equal(both, one)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_one_copy_gives_the_bits_of_two_in_fused_modules(checkpointing: str) -> None:
    pair = [trained(copies, "blockwise", "always", checkpointing) for copies in ("both", "one")]
    for both, one in zip(*pair, strict=True):
        assert torch.equal(both, one)


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_codes_of_w_are_kept_and_the_report_counts_them(recipe: str) -> None:
    held = {}
    for copies in ("both", "one"):
        model = tiny_model()
        report = convert_model(model, recipe, weight_copies=copies)
        operands = [getattr(linear, name) for linear in converted_linears(model) for name in OPERANDS]
        held[copies] = sum(operand.nbytes for operand in operands if operand is not None)
        assert held[copies] == sum(row.code_bytes + row.scale_bytes for row in report.rows)
    if recipe in ("placebo", "bf16"):
        assert held["one"] == held["both"]  # w.T is w's numbers in another order: no copy of its own
    else:
        assert all(linear.wt_qdata is None for linear in converted_linears(model) if linear.precision.quantized)
        assert 0.49 < held["one"] / held["both"] < 0.67  # BF16 linears of a recipe keep what they had


def one_copy(precision: str = "blockwise", N: int = 140, K: int = 160) -> Float8Linear:
    linear = made(1, N, K, PRECISIONS[precision])
    linear.provider = LocalWeight("one")
    linear.forget_weight()
    linear.refresh_weight()
    return linear


def gradient(linear: Float8Linear, x: Tensor) -> Tensor:
    """dx of the sum of y, weighted."""
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("size", list(LINEARS))
def test_gradients_are_those_of_two_copies_in_every_precision_and_shape(precision: str, size: str) -> None:
    M, N, K = LINEARS[size]
    x = normal(M, K)
    pair = made(M, N, K, PRECISIONS[precision]), one_copy(precision, N, K)
    first, second = (gradient(linear, x) for linear in pair)
    assert torch.equal(first, second)
    assert torch.equal(pair[0].weight.grad, pair[1].weight.grad)


@pytest.mark.parametrize("precision", ["blockwise", "fp32-scales", "tensorwise", "gradients-in-e5m2"])
def test_a_weight_edited_in_place_or_announced_is_followed(precision: str) -> None:
    linear, plain, x = one_copy(precision), made(1, 140, 160, PRECISIONS[precision]), normal(64, 160)
    for edit in (
        lambda weight: weight.mul_(1.5),
        lambda weight: weight.copy_(normal(140, 160, seed=5)),
        lambda weight: weight.data.neg_(),
    ):
        for module in (linear, plain):
            with torch.no_grad():
                edit(module.weight)
            weights_changed(nn.Sequential(module))
        assert torch.equal(gradient(linear, x), gradient(plain, x))


def test_codes_are_rewritten_where_they_lie() -> None:
    linear = one_copy()
    codes = linear.w_qdata
    with torch.no_grad():
        linear.weight.mul_(3.0)
    linear.refresh_if_stale()
    assert linear.w_qdata is codes and linear.wt_qdata is None


@pytest.mark.parametrize("precision", ["blockwise", "rowwise-wgrad-bf16"])
def test_a_weight_that_changes_between_forward_and_backward_is_an_error(precision: str) -> None:
    linear = one_copy(precision)
    x = normal(64, 160).requires_grad_()
    y = linear(x)
    with torch.no_grad():
        linear.weight.mul_(2.0)
    linear.refresh_if_stale()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("smooth", [False, True])
def test_the_weight_of_forward_counts_where_it_is_read_in_backward(smooth: bool) -> None:
    found = []
    for copies in ("both", "one"):
        gate, up, down = (made(1, N, K, PRECISIONS["rowwise-wgrad-bf16"]) for N, K in ((96, 64), (96, 64), (64, 96)))
        down.provider = LocalWeight(copies)
        down.set_remedy(InputRemedy(smooth=(gate, up)) if smooth else None)
        x = normal(32, 96).requires_grad_()
        y = down(x)
        down.weight.data = torch.zeros_like(down.weight)
        if smooth:
            with torch.no_grad():
                gate.weight.mul_(64.0)
        y.sum().backward()
        found.append(x.grad)
    assert torch.equal(*found) and bool(found[0].any())


def test_a_transpose_lives_no_longer_than_dgrad_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most, plain = [0], CpuBackend.transpose_codes

    def transpose(self: CpuBackend, q: QTensor) -> QTensor:
        turned = plain(self, q)
        alive.append(weakref.ref(turned.qdata))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return turned

    monkeypatch.setattr(CpuBackend, "transpose_codes", transpose)
    trained("one", "blockwise", "always", steps=1)
    assert len(alive) > 3 and most == [1]


def test_nothing_is_transposed_where_the_input_needs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    plain = CpuBackend.transpose_codes
    monkeypatch.setattr(CpuBackend, "transpose_codes", lambda self, q: calls.append("turned") or plain(self, q))
    linear = one_copy()
    linear(normal(64, 160)).sum().backward()
    assert not calls and linear.weight.grad is not None
    gradient(linear, normal(64, 160))
    assert calls == ["turned"]


def test_a_copy_and_another_precision_keep_one_too() -> None:
    linear, x = copy.deepcopy(one_copy()), normal(64, 160)
    expected = gradient(made(1, 140, 160, BLOCKWISE), x)
    assert torch.equal(gradient(linear, x), expected)
    with evaluation_precision(nn.Sequential(linear), BF16):
        assert linear.w_qdata is None and linear.w_high is not None
    assert linear.wt_qdata is None and torch.equal(gradient(linear, x), expected)


def test_a_second_conversion_changes_what_is_kept() -> None:
    model = tiny_model()
    convert_model(model, "blockwise", weight_copies="one")
    linear = next(found for found in converted_linears(model) if found.precision.quantized)
    assert linear.wt_qdata is None
    convert_model(model, "blockwise")
    assert linear.wt_qdata is not None and linear.provider.copies == "both"
    convert_model(model, "blockwise", weight_copies="one")
    assert linear.wt_qdata is None and linear.w_qdata is not None


def test_a_compiler_leaves_the_transpose_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []
    phase, plain = ["forward"], CpuBackend.transpose_codes
    monkeypatch.setattr(CpuBackend, "transpose_codes", lambda self, q: where.append(phase[0]) or plain(self, q))
    model = tiny_model()
    convert_model(model, "blockwise", weight_copies="one")
    model.compile(backend="aot_eager_decomp_partition", fullgraph=True)  # the partitioner that inductor has
    y = model(torch.arange(128).view(2, 64))
    phase[0] = "backward"
    y.float().square().mean().backward()
    quantized = [linear for linear in converted_linears(model) if linear.precision.quantized]
    assert where == ["backward"] * len(quantized)


def test_explain_adds_up_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    kept = {}
    for copies in ("both", "one"):
        explain(["model=llama3_8b", f"weight_copies={copies}", "device=sm_90"])
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bytes of linears"))
        kept[copies] = line.partition("master, ")[2].partition(" copies")[0]
    assert kept == {"both": "14.0 GiB", "one": "7.48 GiB"}


@pytest.mark.parametrize("recipe", ["blockwise", "rowwise"])
def test_a_run_goes_on_with_the_other_choice_and_the_same_numbers(recipe: str, tmp_path: Path) -> None:
    options = f"recipe={recipe}", "checkpoint.every=3"
    tiny_train(tmp_path, *options, run="straight")
    stopped = tiny_train(tmp_path, *options, "weight_copies=one", "time_limit_seconds=0.001")
    assert 0 < stopped.steps < 6
    tiny_train(tmp_path, *options)  # what it keeps of a weight is no other run
    straight, resumed = (
        [row["loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in row]
        for run in ("straight", "run")
    )
    assert straight == resumed and len(straight) == 6


def test_other_words_and_sharded_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="convert_model: weight_copies is 'two'; needs one of both, one"):
        convert_model(tiny_model(), "blockwise", weight_copies="two")
    with pytest.raises(ConfigError, match="weight_copies"):
        load_config(["weight_copies=two"], "test")
    config = load_config(["weight_copies=one", "parallel=fsdp"], "test")  # one rank keeps its weights whole
    with pytest.raises(ConfigError, match="got one with parallel=fsdp, whose layers keep none; needs both"):
        config.check(2)
