"""Copies of a converted model: deepcopy and pickle keep the numbers, and what they copy follows its own weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

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
