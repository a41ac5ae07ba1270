"""Writes through `.data`, which count no version: those that are followed all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fp8train.convert import convert_model
from fp8train.nn.weights import check_weights, weights_changed
from fp8train.recipe import available_recipes
from tests.convertible_model import EVERYTHING, Model
from tests.nn.precisions import normal, tiny_model
from tests.nn.test_weights import is_current, model_of


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_a_flat_parameter_reaches_the_weights_that_are_parts_of_it(optimizer: type) -> None:
    model = model_of()
    parameters = list(model.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    start = 0
    for parameter in parameters:
        parameter.data = flat.detach()[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    model(normal(6, 130))
    flat.grad = torch.ones_like(flat)
    optimizer([flat], lr=0.5).step()
    assert is_current(model[0]) and is_current(model[2])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("trained_before", [False, True])
def test_a_step_of_a_copy_that_is_written_over_the_weights_reaches_them(compiled: bool, trained_before: bool) -> None:
    """As DeepSpeed's ZeRO does it: parameters are views of one buffer, and the optimizer has a copy of that."""
    model = model_of()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    if trained_before:
        step_of(list(model.parameters()))
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    master = nn.Parameter(flat.clone())
    for _ in range(2):
        run(normal(6, 130))
        step_of([master])
        flat.copy_(master.detach())
        run(normal(6, 130))
        assert is_current(model[0]) and is_current(model[2])


def step_of(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.5).step()


def test_a_step_of_another_model_leaves_the_codes_as_backward_needs_them() -> None:
    """Whose optimizer has linears itself and no copies: a generator is called again after its discriminator's step."""
    generator, discriminator = model_of(), model_of()
    y = generator(normal(6, 130))
    step_of(list(discriminator.parameters()))
    generator(normal(6, 130))
    y.sum().backward()


def test_steps_of_other_parameters_requantise_no_weight_that_has_an_optimizer_or_is_frozen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other = model_of(), nn.Parameter(torch.ones(4))
    model[2].requires_grad_(False)
    step_of(list(model[0].parameters()))
    step_of([other])
    monkeypatch.setattr(type(model[0]), "refresh_weight", lambda self: pytest.fail("requantised"))
    model(normal(6, 130))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_average_put_in_for_an_evaluation_through_data_is_followed_both_ways(compiled: bool) -> None:
    model = model_of()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    run(normal(6, 130))
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    for switch in (model.eval, model.train):
        for parameter, other in zip(model.parameters(), kept, strict=True):
            parameter.data.copy_(other if switch == model.train else other * 1.5)
        switch()
        with torch.no_grad():
            run(normal(6, 130))
        assert is_current(model[0]) and is_current(model[2])


def test_grad_mode_and_a_second_evaluation_requantise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of().eval()
    model(normal(6, 130))
    monkeypatch.setattr(type(model[0]), "refresh_weight", lambda self: pytest.fail("requantised"))
    for _ in range(2):
        with torch.no_grad():
            model(normal(6, 130))
        model(normal(6, 130))


def test_weights_that_are_written_after_to_empty_are_those_of_the_first_forward() -> None:
    with torch.device("meta"):
        model = Model()
    convert_model(model, EVERYTHING, backend="cpu", device_type="cpu")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_()
    model(normal(6, 24))
    assert is_current(model.layers[0].up) and is_current(model.head)


def test_check_weights_names_the_linears_whose_codes_are_of_other_weights() -> None:
    model = Model()
    convert_model(model, EVERYTHING, backend="cpu")
    check_weights(model)
    model(normal(6, 24))
    model.layers[1].down.weight.data.mul_(1.5)
    model.head.weight.detach().numpy()[0] = 3.0
    with pytest.raises(ValueError, match=r"2 of 7 linears.*: layers.1.down, head; .*weights_changed\(model\)"):
        check_weights(model)
    weights_changed(model)
    check_weights(model)


@pytest.mark.parametrize("call", [weights_changed, check_weights])
def test_a_model_that_was_not_converted_is_refused(call: Callable[[nn.Module], None]) -> None:
    with pytest.raises(ValueError, match=f"{call.__name__}: Model has no Float8Linear; needs one or more. Pass"):
        call(Model())


@pytest.mark.parametrize("name", available_recipes())
@pytest.mark.parametrize("copies", ["both", "one"])
def test_weights_of_every_recipe_are_current_after_a_step(name: str, copies: str) -> None:
    model = tiny_model()
    convert_model(model, name, backend="cpu", weight_copies=copies)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.arange(64).view(1, 64)).float().square().mean().backward()
    optimizer.step()
    check_weights(model)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight.mul_(1.5)  # a write that the next forward sees
        model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    check_weights(model)
