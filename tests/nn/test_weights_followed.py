"""Writes that no optimizer makes: exchanged storage, averages of weights, compiled models, torch's own shortcuts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import fp8train
from fp8train.nn.linear import Float8Linear
from fp8train.quant.formats import BLOCKWISE
from tests.nn.precisions import made, normal, tiny_model
from tests.nn.test_weights import is_current, model_of


def test_a_weight_whose_data_was_exchanged_is_followed() -> None:
    model = model_of()
    linear, kept = model[0], model[0].weight.data
    expected = model(normal(6, 130))
    linear.weight.data = normal(140, 130, seed=9)  # as averages of weights are put in for an evaluation
    model(normal(6, 130))
    assert is_current(linear)
    linear.weight.data = kept
    assert torch.equal(model(normal(6, 130)), expected)


def test_a_weight_that_has_grown_is_followed() -> None:
    linear = made(1, 40, 130, BLOCKWISE, bias=False)
    linear.weight.data = torch.cat([linear.weight.data, normal(17, 130)])
    linear.out_features = 57
    assert linear(normal(6, 130)).shape == (6, 57) and is_current(linear)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layers_of_torch_run_their_linears_in_evaluation_too(nested: bool, masked: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = normal(2, 16, 64)
    mask = torch.arange(16) >= torch.tensor([[16], [12]]) if masked else None
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
    rules = [{"match": "*out_proj", "use": "bf16"}, {"match": "*", "use": "fp8"}]
    recipe = fp8train.load_recipe("blockwise").document | {"rules": rules}
    theirs = model.layers[0].register_forward_pre_hook(lambda module, args: None)
    for _ in range(2):  # a second conversion adds no second hook
        fp8train.convert_model(model, recipe)
    assert [len(layer._forward_pre_hooks) for layer in model.layers] == [2, 1]
    theirs.remove()
    with torch.no_grad():
        alone = model(x, src_key_padding_mask=mask)
    rows = slice(None) if mask is None else ~mask  # what is masked is anything
    # attention sums in another order there
    torch.testing.assert_close(alone[rows], model(x, src_key_padding_mask=mask)[rows], rtol=0, atol=1e-2)
    assert float((alone - plain)[rows].abs().max()) > 2e-2


def test_a_weight_that_comes_back_to_an_address_is_not_taken_for_the_old_one() -> None:
    linear = made(1, 96, 160, BLOCKWISE, bias=False)
    for step in range(100):  # as optimizers do that assign: what they free is used again
        linear.weight.data = linear.weight.data * 0.999
        linear.weight.data = linear.weight.data - 0.01 * normal(96, 160, seed=step)
        linear(normal(1, 160))
        assert is_current(linear)


def test_what_is_known_of_a_weight_is_not_copied_or_pickled() -> None:
    linear = made(1, 40, 130, BLOCKWISE)

    def saved() -> Float8Linear:
        file = io.BytesIO()
        torch.save(linear, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    for other in (copy.deepcopy(linear), saved()):
        assert other._seen == () and len(linear._seen) == 1
        assert torch.equal(other(normal(6, 130)), linear(normal(6, 130))) and len(other._seen) == 1
    old = saved()
    del old.provider.__dict__["copies"]  # as one that was pickled before there was a choice
    assert torch.equal(old(normal(6, 130)), linear(normal(6, 130)))


@pytest.mark.parametrize("precision", ["blockwise", "tensorwise", "bf16"])
@pytest.mark.parametrize("fused", ["never", "always"])
def test_a_compiled_model_follows_writes_in_place_and_exchanged_weights(precision: str, fused: str) -> None:
    model = tiny_model()
    fp8train.convert_model(model, precision, fused=fused)
    tokens = torch.arange(128).view(2, 64)

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = compiled(tokens)
        fp8train.weights_changed(model)
        with torch.no_grad():
            return found, compiled(tokens)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first, again = both()
    assert torch.equal(first, again)
    weight = model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(3.0)
    second, again = both()
    assert torch.equal(second, again) and not torch.equal(first, second)
    weight.data = weight.data.flip(0)
    third, again = both()
    assert torch.equal(third, again) and not torch.equal(second, third)


def test_a_compiled_average_of_weights_is_that_of_now() -> None:
    model = tiny_model()
    fp8train.convert_model(model, "blockwise")
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    compiled = torch.compile(average.module, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(128).view(2, 64)
    for _ in range(2):
        model(tokens).float().square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        with torch.no_grad():
            found, eager = compiled(tokens), average.module(tokens)
        torch.testing.assert_close(found, eager, rtol=0, atol=2.0**-6 * float(eager.abs().max()))
        fp8train.weights_changed(average)
        with torch.no_grad():
            assert torch.equal(found, compiled(tokens))
