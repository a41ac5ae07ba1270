"""Quantised inputs: made once for all their readers, never outliving or outdating the input."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8train.backends import get_backend
from fp8train.convert import convert_model
from fp8train.nn.inputs import InputCache, QuantizedInput
from fp8train.nn.linear import Float8Linear
from fp8train.nn.operands import Operand
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
    (row, col) = linear.inputs._slot.operands
    codes = weakref.ref(row.data)
    del row, col, x
    gc.collect()
    assert alive() is None and linear.inputs._slot is None
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
    assert alive() is None and linear.inputs._slot is None


def test_death_of_an_old_input_does_not_empty_the_slot_of_the_next() -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    old, new = normal(6, 130), normal(6, 130, seed=1)
    linear(old)
    linear(new)
    del old
    gc.collect()
    assert linear.inputs._slot is not None


def test_copy_of_a_model_has_one_empty_cache_of_its_own() -> None:
    model = nn.ModuleList(siblings(2))
    x = normal(6, 130)
    model[0](x)
    clone = copy.deepcopy(model)
    assert clone[0].inputs is clone[1].inputs is not model[0].inputs
    assert clone[0].inputs._slot is None
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


@pytest.mark.parametrize("write", ["data", "numpy"])
def test_write_that_moves_no_version_counter_is_seen_by_the_next_forward(write: str) -> None:
    # as a receive of torch.distributed into a buffer: pipeline stages and generation reuse theirs
    q, k = siblings(2)
    x = torch.zeros(6, 130)
    for seed in range(3):
        version = x._version
        if write == "data":
            x.data.copy_(normal(6, 130, seed=seed))
        else:
            x.numpy()[...] = normal(6, 130, seed=seed).numpy()
        assert x._version == version
        for linear, features in ((q, 40), (k, 48)):
            alone = made(1, features, 130, BLOCKWISE, seed=0 if linear is q else 1)
            assert torch.equal(linear(x), alone(x.clone()))


def test_a_converted_model_starts_each_forward_without_an_input() -> None:
    class Half(nn.Module):
        """Reads x by one of two linears, as asked."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"q": nn.Linear(130, 40), "k": nn.Linear(130, 40)})

        def forward(self, x: Tensor, name: str) -> Tensor:
            return self.layers[name](x)

    model = Half()
    convert_model(model, "blockwise", backend="cpu")
    x = normal(6, 130)
    model(x, "q")
    x.data.mul_(-3)
    assert torch.equal(model(x, "k"), model.layers["k"](x.clone()))


def test_threads_share_a_model() -> None:
    """Of two threads neither gets what the other has quantised, however often they are switched."""
    first, second = siblings(2)
    inputs = [normal(4, 130, seed=seed) for seed in (1, 2)]
    wanted = [[linear(x.clone()) for linear in (first, second)] for x in inputs]
    wrong = [0, 0]

    def work(number: int) -> None:
        for _ in range(400):
            x = inputs[number].clone()
            got = [linear(x) for linear in (first, second)]
            wrong[number] += not all(map(torch.equal, got, wanted[number]))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == [0, 0]


def test_numbers_that_were_never_written_are_asked_for_in_vain() -> None:
    x = normal(6, 130)
    given = QuantizedInput(x, Operand(x), None)
    for use in (lambda: nn.Linear(130, 4)(given), lambda: torch.relu(given), lambda: given + x, lambda: x * given):
        with pytest.raises(TypeError, match="QuantizedInput"):
            use()
    with pytest.raises(TypeError, match="Wrap linears before convert_model"):
        nn.functional.linear(given, torch.zeros(4, 130))


def test_exchange_of_an_inputs_memory_is_seen_by_the_next_reader() -> None:
    first, second = siblings(2)
    x, other = normal(6, 130, seed=1), normal(6, 130, seed=2)
    first(x)
    x.data = other.clone()
    assert torch.equal(second(x), second(other))
