"""Copies of a converted model: deepcopy and pickle keep the numbers, and what they copy follows its own weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fp8train._layout import folder
from fp8train.convert import convert_model
from fp8train.nn.weights import OPERANDS
from tests.nn.precisions import normal
from tests.nn.test_weights import edit_in_place, is_current, model_of


def reloaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_copy_and_pickle_keep_the_numbers_and_share_nothing() -> None:
    model = model_of()
    x = normal(6, 130)
    expected = model(x)
    clone = copy.deepcopy(model)
    for other in (clone, reloaded(model)):
        assert torch.equal(other(x), expected)
        edit_in_place(other[0])
        assert not torch.equal(other(x), expected)
        assert other[0].inputs is not model[0].inputs
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded])
def test_a_copy_sees_every_edit_however_many_versions_the_original_had(copied: Callable) -> None:
    """An average of weights: the copy's weights count their versions anew, up to the number that the original had."""
    model = model_of()
    for _ in range(3):
        edit_in_place(model[0])
        model(normal(6, 130))
    clone = copied(model)
    for _ in range(model[0].weight._version + 1):
        with torch.no_grad():
            clone[0].weight.mul_(1.5)
        clone(normal(6, 130))
        assert is_current(clone[0])
    clone = copied(model)
    with torch.no_grad():
        for _ in range(model[0].weight._version - clone[0].weight._version):
            clone[0].weight.mul_(1.5)
    clone(normal(6, 130))
    assert is_current(clone[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded])
@pytest.mark.parametrize("recipe", sorted(path.stem for path in folder("recipes").glob("*.yaml")))
def test_a_copy_has_the_gradients_of_every_shipped_recipe(recipe: str, copied: Callable) -> None:
    # a copy of a recipe's precision is another object; E5M2 is told from E4M3 in it too
    model = nn.Sequential()
    model.layers = nn.Sequential(nn.Linear(130, 140), nn.Linear(140, 20))
    convert_model(model, recipe, backend="cpu")
    results = []
    for each in (model, copied(model)):
        x = normal(6, 130).requires_grad_(True)
        y = each.layers(x)
        y.backward(normal(6, 20, seed=1))
        results.append([y, x.grad, *(parameter.grad for parameter in each.parameters())])
    assert all(map(torch.equal, *results))


def test_operands_are_no_buffers_which_others_average_send_and_check() -> None:
    model = model_of()
    assert list(model.buffers()) == []
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        edit_in_place(model[0])
        average.update_parameters(model)
        average(normal(6, 130))
        assert is_current(average.module[0])


def test_a_linear_pickled_while_operands_were_buffers_is_read() -> None:
    model = model_of()
    x = normal(6, 130)
    expected = model(x)
    for name in OPERANDS:
        operand = model[0].__dict__.pop(name)
        model[0].register_buffer(name, operand, persistent=False)
    other = reloaded(model)
    assert list(other.buffers()) == []
    assert torch.equal(other[0].w_qdata.view(torch.uint8), model[0].w_qdata.view(torch.uint8))
    assert torch.equal(other(x), expected)


def test_a_replica_of_data_parallel_makes_operands_of_its_own() -> None:
    linear = model_of()[0]
    replica = linear._replicate_for_data_parallel()
    assert all(getattr(replica, name) is None for name in OPERANDS)
    assert is_current(linear)


def test_a_trace_that_would_hold_codes_as_constants_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.trace is active; needs torch.export"):
        torch.jit.trace(model_of(), normal(6, 130))
