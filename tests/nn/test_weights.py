"""Weight codes change when the weight does, and only then."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8train
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import (
    OPERANDS,
    LocalWeight,
    converted_linears,
    evaluation_precision,
    install_weight_hooks,
    weights_changed,
)
from fp8train.quant import reference
from fp8train.quant.formats import BF16, BLOCKWISE, FP32, LinearPrecision, QuantSpec
from tests.nn.precisions import PRECISIONS, made, normal, precisions

SQUARE = QuantSpec.parse("e4m3 128x128")


def model_of(precision: LinearPrecision = BLOCKWISE) -> nn.Sequential:
    model = nn.Sequential(made(1, 140, 130, precision), nn.ReLU(), made(1, 20, 140, precision, seed=1))
    install_weight_hooks(model)
    return model


def is_current(linear: Float8Linear) -> bool:
    """Whether both copies are the codes of the master, bit for bit."""
    expected = reference.quantize(linear.weight.detach(), SQUARE)
    copies = (
        (linear.w_qdata, linear.w_scale_inv, expected),
        (linear.wt_qdata, linear.wt_scale_inv, expected.transpose()),
    )
    return all(
        torch.equal(codes.view(torch.uint8), q.qdata.view(torch.uint8)) and torch.equal(scale, q.scale_inv)
        for codes, scale, q in copies
    )


@pytest.fixture
def refreshes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Float8Linear]]:
    """Every linear whose operands were made, in order."""
    seen: list[Float8Linear] = []
    refresh = LocalWeight.refresh

    def record(self: LocalWeight, linear: Float8Linear) -> None:
        seen.append(linear)
        refresh(self, linear)

    monkeypatch.setattr(LocalWeight, "refresh", record)
    yield seen


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.5),
    "sgd-fused": lambda params: torch.optim.SGD(params, lr=0.5, fused=True),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, lr=0.5, foreach=True),
    "adamw-loop": lambda params: torch.optim.AdamW(params, lr=0.5, foreach=False),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
}
optimizers = pytest.mark.parametrize("optimizer", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(normal(6, 130)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@optimizers
def test_codes_are_made_anew_by_a_step_before_the_next_forward(optimizer: Callable[..., Any], refreshes: list) -> None:
    model = model_of()
    opt = optimizer(model.parameters())
    addresses = [linear.w_qdata.data_ptr() for linear in converted_linears(model)]
    before = [linear.w_qdata.view(torch.uint8).clone() for linear in converted_linears(model)]
    refreshes.clear()
    step(model, opt)
    assert refreshes == converted_linears(model)  # once each
    for linear, old, address in zip(converted_linears(model), before, addresses, strict=True):
        assert is_current(linear) and not torch.equal(linear.w_qdata.view(torch.uint8), old)
        assert linear.w_qdata.data_ptr() == address  # rewritten in place: compiled graphs keep the address


@optimizers
@pytest.mark.parametrize("kind", ["standalone", "copied", "unpickled", "replaced-weight"])
def test_step_reaches_a_linear_however_it_came_to_be(optimizer: Callable[..., Any], kind: str) -> None:
    linear = made(1, 140, 130, BLOCKWISE)
    if kind == "copied":
        linear = copy.deepcopy(model_of())[0]
    elif kind == "unpickled":
        buffer = io.BytesIO()
        torch.save(model_of(), buffer)
        buffer.seek(0)
        linear = torch.load(buffer, weights_only=False)[0]
    elif kind == "replaced-weight":
        linear.weight = nn.Parameter(normal(140, 130, seed=9))
    step(linear, optimizer(linear.parameters()))
    assert is_current(linear)


def test_step_touches_only_the_linears_whose_weights_it_owns(refreshes: list) -> None:
    model = model_of()
    opt = torch.optim.SGD(model[2].parameters(), lr=0.5)
    refreshes.clear()
    step(model, opt)
    assert refreshes == [model[2]]


def test_step_survives_the_death_of_another_model() -> None:
    dead, model, other = model_of(), model_of(), model_of()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    step(model, opt)
    del dead
    gc.collect()
    step(model, opt)
    assert all(is_current(linear) for linear in (*converted_linears(model), *converted_linears(other)))


def test_dead_model_is_not_kept_alive_by_the_hook() -> None:
    model = model_of()
    linears = [weakref.ref(linear) for linear in converted_linears(model)]
    del model
    gc.collect()
    assert [reference() for reference in linears] == [None, None]


def test_codes_are_made_anew_for_no_micro_batch_and_once_for_an_evaluation(refreshes: list) -> None:
    model = model_of()
    model(normal(6, 130))
    refreshes.clear()
    for seed in range(3):
        model(normal(6, 130, seed=seed)).sum().backward()
    model.zero_grad()
    model.requires_grad_(False).requires_grad_(True)
    assert refreshes == []
    model.eval()  # an average of the weights may have been put in
    with torch.no_grad():
        model(normal(6, 130))
    with torch.inference_mode():
        model(normal(6, 130))
    assert refreshes == converted_linears(model)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_a_state_dict_makes_codes_anew_at_once(assign: bool) -> None:
    model, other = model_of(), model_of()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-2)
    model.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
    assert all(is_current(linear) for linear in converted_linears(model))
    assert torch.equal(model(normal(6, 130)), other(normal(6, 130)))


def edit_in_place(linear: Float8Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(3)


def edit_element(linear: Float8Linear) -> None:
    with torch.no_grad():
        linear.weight[0, 0] = 100.0


def replace_weight(linear: Float8Linear) -> None:
    linear.weight = nn.Parameter(normal(*linear.weight.shape, seed=5))


def reinitialise(linear: Float8Linear) -> None:
    nn.init.normal_(linear.weight)


EDITS = [edit_in_place, edit_element, replace_weight, reinitialise]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("through", ["model", "linear"])
def test_edit_that_autograd_sees_is_seen_by_the_next_forward(edit: Callable[..., None], through: str) -> None:
    model = model_of()
    edit(model[0])
    assert not is_current(model[0])
    if through == "model":
        model(normal(6, 130))
    else:
        model[0](normal(6, 130))
    assert is_current(model[0])


def test_weight_replaced_many_times_is_never_taken_for_an_old_one_at_the_same_address() -> None:
    linear = made(1, 8, 8, BLOCKWISE)
    for seed in range(100):
        linear(normal(2, 8))
        linear.weight = nn.Parameter(normal(8, 8, seed=2 * seed))
        linear.weight = nn.Parameter(normal(8, 8, seed=2 * seed + 1))  # takes the memory of the weight before the last
        linear(normal(2, 8))
        assert is_current(linear)


def test_data_edit_is_seen_once_it_is_announced() -> None:
    model = model_of()
    for linear in converted_linears(model):
        linear.weight.data.mul_(3)
    model(normal(6, 130))
    assert not is_current(model[0])  # what makes the announcement necessary
    fp8train.weights_changed(model)
    assert all(is_current(linear) for linear in converted_linears(model))


def test_announcement_reaches_linears_below_a_wrapper_and_a_linear_itself() -> None:
    model = model_of()
    wrapped = nn.ModuleDict({"inner": nn.ModuleList([model])})
    model[0].weight.data.mul_(3)
    weights_changed(wrapped)
    assert is_current(model[0])
    model[2].weight.data.mul_(3)
    weights_changed(model[2])
    assert is_current(model[2])


def test_codes_are_in_no_state_dict_whose_keys_are_those_of_nn_linear() -> None:
    model = model_of()
    plain = nn.Sequential(nn.Linear(130, 140), nn.ReLU(), nn.Linear(140, 20))
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert {value.dtype for value in state.values()} == {torch.float32}
    plain.load_state_dict(state)  # strict
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["0.weight"], model[0].weight)


@precisions
def test_moving_the_module_makes_codes_anew_and_casts_none(precision: LinearPrecision) -> None:
    model = model_of(precision)
    x = normal(6, 130)
    expected = model(x)
    held = {name: getattr(getattr(model[0], name), "dtype", None) for name in OPERANDS}
    for move in (lambda: model.to("cpu"), model.float, lambda: model.to(torch.float32), model.cpu):
        move()
        # at once: the next forward may be a compiled one
        assert {name: getattr(getattr(model[0], name), "dtype", None) for name in OPERANDS} == held
        assert torch.equal(model(x), expected)


def test_cast_to_bf16_and_back_gives_the_codes_of_the_rounded_weight() -> None:
    model = model_of()
    rounded = model[0].weight.detach().to(torch.bfloat16).float()
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(model[0].weight, rounded) and is_current(model[0])


def test_layer_laid_out_on_meta_is_filled_later() -> None:
    linear = Float8Linear(130, 140, device="meta")
    assert linear.weight.is_meta and linear.w_qdata is None
    linear.to_empty(device="cpu")
    linear.weight.data.copy_(normal(140, 130))
    linear.bias.data.zero_()
    weights_changed(linear)
    assert is_current(linear)
    again = Float8Linear(130, 140, device="meta")
    again.load_state_dict(linear.state_dict(), assign=True)
    x = normal(6, 130)
    assert is_current(again) and torch.equal(again(x), linear(x))


def test_initialisation_in_place_after_meta_is_seen_without_announcement() -> None:
    linear = Float8Linear(130, 140, device="meta").to_empty(device="cpu")
    nn.init.normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    linear(normal(6, 130))
    assert is_current(linear)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_evaluation_in_another_precision_restores_and_can_train_afterwards(mode: Callable[[], Any]) -> None:
    model = nn.Sequential(made(1, 140, 130, BLOCKWISE), made(1, 20, 140, FP32))
    plain = nn.Sequential(made(1, 140, 130, BF16), made(1, 20, 140, BF16))
    plain.load_state_dict(model.state_dict())
    x = normal(6, 130)
    before = model(x)
    with mode(), evaluation_precision(model, BF16):
        assert torch.equal(model(x), plain(x)) and {lin.precision for lin in model} == {BF16}
    assert [linear.precision for linear in model] == [BLOCKWISE, FP32]
    after = model(x.requires_grad_(True))  # dgrad reads the weight's codes
    assert torch.equal(after, before)
    after.sum().backward()  # codes made in inference mode could not be saved for it
    assert model[0].weight.grad is not None


def test_evaluation_that_fails_restores_too() -> None:
    model = model_of()
    with pytest.raises(KeyError), evaluation_precision(model, BF16):
        raise KeyError
    assert model[0].precision == BLOCKWISE and is_current(model[0])


def test_model_first_run_in_inference_mode_can_train_afterwards() -> None:
    model = model_of()
    edit_in_place(model[0])
    with torch.inference_mode():
        model(normal(6, 130))
    x = normal(6, 130).requires_grad_(True)
    model(x).sum().backward()
    assert x.grad is not None


def test_model_built_in_inference_mode_runs() -> None:
    with torch.inference_mode():
        linear = Float8Linear(130, 140)
        assert linear(normal(6, 130)).shape == (6, 140)


def test_refresh_between_forward_and_backward_is_not_silently_used() -> None:
    # backward would read other codes than forward did
    linear = made(1, 140, 130, BLOCKWISE)
    y = linear(normal(6, 130).requires_grad_(True))
    edit_in_place(linear)
    weights_changed(linear)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["blockwise", "bf16", "fp32", "weight-only", "fp8-beside-fp32", "tensorwise"])
def test_only_the_copies_that_the_precision_reads_are_kept(name: str) -> None:
    linear = made(1, 140, 130, PRECISIONS[name])
    held = {operand for operand in OPERANDS if getattr(linear, operand) is not None}
    codes = {"w_qdata", "w_scale_inv", "wt_qdata", "wt_scale_inv"}
    assert held == {"bf16": {"w_high"}, "fp32": set()}.get(name, codes)


def test_dgrad_operand_is_the_byte_transpose_of_fprops() -> None:
    linear = made(1, 303, 200, BLOCKWISE)
    assert torch.equal(linear.wt_qdata.view(torch.uint8), linear.w_qdata.view(torch.uint8).T)
    assert torch.equal(linear.wt_scale_inv, linear.w_scale_inv.T)


def test_hooks_are_installed_once() -> None:
    model = model_of()
    install_weight_hooks(model)
    assert len(model._forward_pre_hooks) == 1


def test_stepped_weight_gives_the_output_of_a_fresh_model(tmp_path: Any) -> None:
    model = model_of()
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    fresh = model_of()
    fresh.load_state_dict(model.state_dict())
    x: Tensor = normal(6, 130, seed=4)
    assert torch.equal(model(x), fresh(x))
