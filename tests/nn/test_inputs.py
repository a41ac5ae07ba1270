"""Quantised inputs: made once for all their readers, never outliving or outdating the input."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8train.backends import get_backend
from fp8train.nn.inputs import InputCache
from fp8train.nn.linear import Float8Linear
from fp8train.quant.formats import BF16, BLOCKWISE, LinearPrecision
from tests.nn.precisions import PRECISIONS, made, normal, run


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the matrices that the quantisers of backend `cpu` were given, in order."""
    backend = get_backend("cpu")
    shapes: list[tuple[int, ...]] = []
    for name in ("quantize", "quantize_dual"):
        kept = getattr(backend, name)

        def record(x: Tensor, *arguments: Any, kept: Any = kept) -> Any:
            shapes.append(tuple(x.shape))
            return kept(x, *arguments)

        monkeypatch.setattr(backend, name, record)
    yield shapes


def siblings(count: int, precision: LinearPrecision = BLOCKWISE) -> list[Float8Linear]:
    """Linears that read the same input, as convert_model leaves them: one cache for all."""
    linears = [made(1, 40 + 8 * i, 130, precision, seed=i) for i in range(count)]
    for linear in linears:
        linear.inputs = linears[0].inputs
    return linears


def test_input_of_q_k_v_is_quantised_once(quantised: list) -> None:
    q, k, v = siblings(3)
    x = normal(6, 130).requires_grad_(True)
    sum(linear(x).sum() for linear in (q, k, v)).backward()
    assert quantised.count((6, 130)) == 1
    assert [shape for shape in quantised if shape != (6, 130)] == [(6, 56), (6, 48), (6, 40)]  # each dy once


@pytest.mark.parametrize("name", ["blockwise", "requant", "tensorwise", "wgrad-only", "input-only", "bf16"])
def test_sharing_changes_no_number(name: str) -> None:
    shared, alone = siblings(3, PRECISIONS[name]), siblings(3, PRECISIONS[name])
    for linear in alone:
        linear.inputs = InputCache()
    x, dys = normal(6, 130), [normal(6, linear.out_features, seed=7) for linear in shared]
    results = []
    for linears in (shared, alone):
        leaf = x.clone().requires_grad_(True)
        torch.autograd.backward([linear(leaf) for linear in linears], dys)
        results.append([leaf.grad, *[linear.weight.grad for linear in linears]])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_another_input_another_precision_and_another_need_are_quantised_anew(quantised: list) -> None:
    first, second = siblings(2)
    x = normal(6, 130)
    first(x)
    first(x.clone())
    assert len(quantised) == 2
    second.set_precision(PRECISIONS["1x32"])
    quantised.clear()
    first(x)
    assert torch.equal(second(x), made(1, 48, 130, PRECISIONS["1x32"], seed=1)(x))
    quantised.clear()
    second.set_precision(BLOCKWISE)
    second.weight.requires_grad_(False)  # makes no column copy, and must not give one without to the first
    quantised.clear()
    second(x)
    first(x).sum().backward()
    assert first.weight.grad is not None


def test_in_place_edit_between_two_readers_is_seen() -> None:
    first, second = siblings(2)
    x = normal(6, 130)
    first(x)
    x.mul_(-3)
    assert torch.equal(second(x), made(1, 48, 130, BLOCKWISE, seed=1)(x.clone()))


def test_input_that_an_optimizer_steps_is_quantised_anew() -> None:
    # a learned prompt: a fused optimizer writes it without moving its version counter
    linear = made(1, 40, 130, BLOCKWISE)
    linear.requires_grad_(False)
    prompt = nn.Parameter(normal(6, 130))
    optimizer = torch.optim.AdamW([prompt], lr=0.5, fused=True)
    before = linear(prompt)
    before.sum().backward()
    optimizer.step()
    assert torch.equal(linear(prompt), linear(prompt.detach().clone()))
    assert not torch.equal(linear(prompt), before)


def test_edit_under_inference_mode_is_seen() -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    with torch.inference_mode():
        x = normal(6, 130)
        linear(x)
        x.mul_(-3)
        assert torch.equal(linear(x), linear(x.clone()))


def test_cache_does_not_outlive_its_input() -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    x = normal(6, 130).requires_grad_(True) * 1.0
    alive = weakref.ref(x)
    y = linear(x)
    (row, col) = linear.inputs._operands
    codes = weakref.ref(row.data)
    del row, col, x
    gc.collect()
    assert alive() is None and linear.inputs._operands is None
    assert codes() is None  # the row copy is gone while the graph is alive; the column copy is the graph's
    y.sum().backward()
    assert linear.weight.grad is not None


def test_cache_does_not_keep_its_input_alive() -> None:
    linear = made(1, 40, 130, BF16)  # its operand is the input itself
    x = normal(6, 130).to(torch.bfloat16)
    alive = weakref.ref(x)
    with torch.no_grad():
        linear(x)
    del x
    gc.collect()
    assert alive() is None and linear.inputs._operands is None


def test_death_of_an_old_input_does_not_empty_the_slot_of_the_next() -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    old, new = normal(6, 130), normal(6, 130, seed=1)
    linear(old)
    linear(new)
    del old
    gc.collect()
    assert linear.inputs._operands is not None


def test_copy_of_a_model_has_one_empty_cache_of_its_own() -> None:
    model = nn.ModuleList(siblings(2))
    x = normal(6, 130)
    model[0](x)
    clone = copy.deepcopy(model)
    assert clone[0].inputs is clone[1].inputs is not model[0].inputs
    assert clone[0].inputs._operands is None
    assert torch.equal(clone[1](x), model[1](x))


def test_input_with_leading_dimensions_shares_its_codes(quantised: list) -> None:
    first, second = siblings(2)
    x = normal(2, 3, 130)
    first(x)
    second(x)
    assert quantised == [(6, 130)]


def test_forward_with_gradient_after_one_without_saves_a_column_copy() -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    x = normal(6, 130)
    with torch.no_grad():
        linear(x)
    expected = run(linear, x, torch.ones(6, 40))
    linear(x).sum().backward()
    assert torch.equal(linear.weight.grad, expected.dw)
