"""Whoever looks at what a fused module reads or gives sees numbers: hooks on it, on what it passes through, on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fp8train.models import Decoder
from fp8train.nn.inputs import QuantizedInput
from tests.nn.test_fused_models import batch, decoder, train

PLACES: dict[str, Callable[[Decoder], nn.Module]] = {
    "norm": lambda model: model.layers[1].input_layernorm,
    "attention": lambda model: model.layers[1].self_attn,
    "post norm": lambda model: model.layers[1].post_attention_layernorm,
    "mlp": lambda model: model.layers[1].mlp,
    "reader": lambda model: model.layers[1].mlp.up_proj,
    "down_proj": lambda model: model.layers[1].mlp.down_proj,
}


def loss(model: Decoder) -> Tensor:
    return model(*batch(0))


def tensors(values: Any) -> list[Tensor | QuantizedInput]:
    """All tensors in arguments and results, and what stands for one."""
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in tensors(value)]
    return [values] if isinstance(values, Tensor | QuantizedInput) else []


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("place", list(PLACES))
def test_a_hook_sees_numbers_and_changes_none(place: str, kind: str) -> None:
    alone, watched = decoder("always")[0], decoder("always")[0]
    seen: list[Any] = []
    module = PLACES[place](watched)
    handle = getattr(module, f"register_{kind}_hook")(lambda _, *values: seen.extend(tensors(values)))
    expected, got = train(alone, steps=1), train(watched, steps=1)
    assert seen and all(type(value) is Tensor and bool(value.isfinite().all()) for value in seen)
    assert expected[0] == got[0]
    for name, gradient in expected[1].items():
        assert torch.equal(gradient, got[1][name]), name
    handle.remove()


def test_a_hook_that_does_not_read_leaves_them_fused() -> None:
    model = decoder("always")[0]
    seen: list[type] = []

    def hook(module: nn.Module, arguments: tuple) -> None:
        seen.append(type(arguments[0]))

    hook.reads_values = False  # type: ignore[attr-defined]
    model.layers[1].mlp.register_forward_pre_hook(hook)
    loss(model)
    assert seen == [QuantizedInput]


def test_a_hook_on_all_modules_sees_numbers() -> None:
    model = decoder("always")[0]
    expected, seen = loss(model), []
    handle = register_module_forward_pre_hook(lambda _, values: seen.extend(tensors(values)))
    try:
        got = loss(model)
    finally:
        handle.remove()
    assert torch.equal(got, expected)
    assert len(seen) > 20 and all(isinstance(value, Tensor) for value in seen)
    assert all(bool(value.isfinite().all()) for value in seen if value.is_floating_point() and value.dim() > 2)


def test_a_linear_that_was_wrapped_after_conversion_says_what_to_do() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.down = base, nn.Linear(136, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.down(x).sum()

    model = decoder("always")[0]
    model.layers[0].self_attn.q_proj = Adapted(model.layers[0].self_attn.q_proj)
    with pytest.raises(TypeError, match=r"needs a Float8Linear as reader.*Wrap linears before convert_model"):
        loss(model)
