"""Groups, FP32 and BF16 moments."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fp8train.errors import ConfigError
from fp8train.optim import (
    AdamWBF16Moments,
    OptimConfig,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)

MOMENTS = ["fp32", "bf16"]


class Tied(nn.Module):
    """Embedding, a linear with bias, a norm, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.embed_tokens = nn.Embedding(16, 8)
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head.weight = self.embed_tokens.weight


def _trained(moments, steps, *, seed=0, model=None, optimizer=None):
    """A small model after some steps on gradients that depend on seed and step only."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    optimizer = optimizer or build_optimizer(model, OptimConfig(lr=1e-2), moments)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed + step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def test_only_matrices_outside_embeddings_decay():
    groups = {g["name"]: ([name for name, _ in g["params"]], g["weight_decay"]) for g in parameter_groups(Tied(), 0.1)}
    # named_parameters names a tied weight by its first owner, which here is lm_head: still an embedding
    assert groups == {
        "decay": (["proj.weight"], 0.1),
        "no_decay": (["lm_head.weight", "proj.bias", "norm.weight", "norm.bias"], 0.0),
    }


def test_untied_head_decays():
    model = Tied()
    model.lm_head.weight = nn.Parameter(torch.zeros(16, 8))
    names = {name for name, _ in parameter_groups(model, 0.1)[0]["params"]}
    assert names == {"lm_head.weight", "proj.weight"}


def test_bias_with_two_dimensions_does_not_decay():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.bias = nn.Parameter(torch.zeros(4, 8))
    assert [g["name"] for g in parameter_groups(model, 0.1)] == ["no_decay"]


def test_groups_know_the_names_of_their_parameters():
    decay, no_decay = build_optimizer(Tied(), OptimConfig()).param_groups
    assert (decay["name"], decay["weight_decay"], decay["param_names"]) == ("decay", 0.1, ["proj.weight"])
    assert (no_decay["name"], no_decay["weight_decay"], no_decay["param_names"][0]) == ("no_decay", 0, "lm_head.weight")


def test_frozen_parameters_are_left_out():
    model = Tied()
    model.proj.weight.requires_grad_(False)
    assert [g["name"] for g in build_optimizer(model, OptimConfig()).param_groups] == ["no_decay"]


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="0 trainable parameters"):
        build_optimizer(Tied().requires_grad_(False), OptimConfig())


def test_parameter_that_is_not_fp32_is_refused_by_name():
    model = Tied()
    model.proj.bfloat16()
    with pytest.raises(ConfigError, match="proj.weight is torch.bfloat16"):
        build_optimizer(model, OptimConfig())


@pytest.mark.parametrize(
    ("configured", "recipe", "want"),
    [
        ("auto", "fp32", torch.float32),
        ("auto", "bf16", torch.bfloat16),
        ("fp32", "bf16", torch.float32),
        ("bf16", "fp32", torch.bfloat16),
    ],
    ids=["recipe_fp32", "recipe_bf16", "config_fp32_wins", "config_bf16_wins"],
)
def test_moments_come_from_the_config_or_else_from_the_recipe(configured, recipe, want):
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, OptimConfig(moments=configured), recipe)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert {optimizer.state[model.weight][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {want}
    assert model.weight.dtype == torch.float32


def _by_hand(weight, grads, *, lr, decay, rounded, betas=(0.9, 0.95), eps=1e-8):
    """AdamW of one number in FP64; moments rounded to BF16 after each step if asked."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        weight *= 1 - lr * decay
        weight -= lr * (m / (1 - betas[0] ** t)) / (math.sqrt(v / (1 - betas[1] ** t)) + eps)
        if rounded:
            m, v = torch.tensor([m, v], dtype=torch.float64).bfloat16().tolist()
    return weight, m, v


@pytest.mark.parametrize("moments", MOMENTS)
def test_update_equals_the_formula(moments):
    torch.manual_seed(3)
    grads = torch.randn(40).tolist()
    model = nn.Module()
    model.weight = nn.Parameter(torch.full((1, 1), 0.5))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1), moments)
    for g in grads:
        model.weight.grad = torch.full((1, 1), g)
        optimizer.step()
    weight, m, v = _by_hand(0.5, grads, lr=1e-2, decay=0.1, rounded=moments == "bf16")
    # 40 steps of about five FP32 roundings of terms below 1: 40 * 5 * 2^-24 = 1.2e-5
    assert model.weight.item() == pytest.approx(weight, abs=1.2e-5)
    state = optimizer.state[model.weight]
    assert (state["exp_avg"].item(), state["exp_avg_sq"].item()) == (
        pytest.approx(m, rel=1e-5),
        pytest.approx(v, rel=1e-5),
    )


@pytest.mark.parametrize("moments", MOMENTS)
def test_weights_decay_before_they_are_updated(moments):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1, 1))
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.5), moments)
    model.weight.grad = torch.full((1, 1), 3.0)
    optimizer.step()
    # the first update of Adam is lr; decayed after it, the weight would be (1 - 0.5) * 0.75 = 0.375
    assert model.weight.item() == pytest.approx(1.0 * (1 - 0.5 * 0.5) - 0.5, rel=1e-6)


def test_bf16_moments_do_the_arithmetic_in_fp32():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1, 1))
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.0), "bf16")
    model.weight.grad = torch.full((1, 1), 3.0)
    optimizer.step()
    model.weight.grad = torch.full((1, 1), 1.0)
    optimizer.step()
    m1, v1 = torch.tensor([0.1 * 3, 0.05 * 9]).bfloat16().tolist()
    m2, v2 = 0.9 * m1 + 0.1, 0.95 * v1 + 0.05  # not rounded before they are used
    want = -0.5 - 0.5 * (m2 / (1 - 0.81)) / math.sqrt(v2 / (1 - 0.95**2))
    assert model.weight.item() == pytest.approx(
        want, rel=1e-6
    )  # ten FP32 roundings; BF16 moments would differ by up to 2^-8


@pytest.mark.parametrize("moments", MOMENTS)
def test_two_runs_are_bitwise_equal(moments):
    first, _ = _trained(moments, 5)
    second, _ = _trained(moments, 5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("moments", MOMENTS)
def test_state_dict_continues_bit_for_bit(moments):
    straight, _ = _trained(moments, 6)
    model, optimizer = _trained(moments, 3)
    resumed = copy.deepcopy(model)
    fresh = build_optimizer(resumed, OptimConfig(lr=1e-2), moments)
    fresh.load_state_dict(optimizer.state_dict())
    _trained(moments, 3, seed=3, model=resumed, optimizer=fresh)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_loaded_bf16_moments_stay_bf16_and_are_copies():
    model, optimizer = _trained("bf16", 2)
    fresh = build_optimizer(copy.deepcopy(model), OptimConfig(), "bf16")
    fresh.load_state_dict(optimizer.state_dict())
    for new, old in zip(fresh.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert fresh.state[new][key].dtype == torch.bfloat16
            assert torch.equal(fresh.state[new][key], optimizer.state[old][key])
            assert fresh.state[new][key].data_ptr() != optimizer.state[old][key].data_ptr()


def test_cutting_tensors_into_pieces_changes_no_bit(monkeypatch):
    whole, _ = _trained("bf16", 4)
    monkeypatch.setattr(AdamWBF16Moments, "PIECE", 6)
    cut, _ = _trained("bf16", 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_parameter_that_is_not_contiguous_is_updated_in_place(monkeypatch):
    monkeypatch.setattr(AdamWBF16Moments, "PIECE", 6)
    results = []
    for transposed in (False, True):
        torch.manual_seed(0)
        weight = torch.randn(4, 5)
        model = nn.Module()
        model.weight = nn.Parameter(weight.t().contiguous().t() if transposed else weight)
        optimizer = build_optimizer(model, OptimConfig(), "bf16")
        model.weight.grad = torch.ones(4, 5)
        optimizer.step()
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("moments", MOMENTS)
def test_parameter_without_gradient_is_left_alone(moments):
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    optimizer = build_optimizer(model, OptimConfig(), moments)
    before = model[1].weight.detach().clone()
    model[0].weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize("moments", MOMENTS)
def test_post_step_hook_runs_once_a_step(moments):
    calls = []
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(), moments)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert calls == [1]


@pytest.mark.parametrize("moments", MOMENTS)
def test_set_learning_rate_is_obeyed_by_every_group(moments):
    model = Tied()
    optimizer = build_optimizer(model, OptimConfig(), moments)
    before = copy.deepcopy(model.state_dict())
    set_learning_rate(optimizer, 0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_beta_that_bf16_cannot_follow_is_refused():
    with pytest.raises(ConfigError, match=r"betas are \[0.9, 0.999\] with BF16 moments; needs at most 0.996"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(betas=(0.9, 0.999)), "bf16")


def test_slowest_beta_that_is_accepted_still_shrinks_every_bf16_number():
    every = (
        torch.arange(0x0100, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    )  # all from 2^-125 up: below 2^-126 the spacing no longer shrinks with the number
    beta = 1 - 2.0**-8
    shrunk = (every.float() * beta).bfloat16()
    assert bool((shrunk < every).all())
    assert not bool(((every.float() * 0.999).bfloat16() < every).all())
