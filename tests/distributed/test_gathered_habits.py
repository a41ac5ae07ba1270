"""What users do with a model between its steps, where FSDP2 gathers what the GEMMs multiply and where it does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import fp8train
from fp8train.convert import convert_model
from fp8train.nn.weights import converted_linears
from fp8train.quant.formats import BF16, BLOCKWISE, FP32
from fp8train.recipe import load_recipe
from tests.distributed.ranks import run_ranks
from tests.distributed.test_gathered_operands import INNER, WIDTH, inputs, other_codes, sharded_model


def _moved(model: nn.Sequential) -> nn.Sequential:
    model.double().float()
    return model


def _assigned(model: nn.Sequential) -> nn.Sequential:
    model.load_state_dict({name: weight * 0.75 for name, weight in model.state_dict().items()}, assign=True)
    return model


def _written_locally(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        for weight in model.parameters():
            weight.to_local().mul_(0.75)
    return model


def _written_by_one(model: nn.Sequential) -> nn.Sequential:
    """Where a rank has no rows, writes to those of others need a word, but no rank waits for another without it."""
    with torch.no_grad():
        for weight in model.parameters():
            if (own := weight.to_local()).numel():
                own.mul_(0.75)
        model(inputs())
    for module in (*model, model):
        module.reshard()
    fp8train.weights_changed(model)
    return model


def _after(change: Callable[[nn.Sequential], nn.Sequential], gather: bool, inner: int = INNER) -> list[torch.Tensor]:
    """Results of a forward, and of two steps after a change; the first of two ranks has the larger half of the rows."""
    model = sharded_model(BLOCKWISE, gather, inner, reshard_after_forward=False)
    with torch.no_grad():
        seen = [model(inputs())]
    for module in (*model, model):
        module.reshard()
    optimizer = torch.optim.AdamW(change(model).parameters(), lr=0.01)
    for _ in range(2):
        y = model(inputs())
        y.square().mean().backward()
        seen += [y.detach().clone(), model[0][0].weight.grad.full_tensor()]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def _accumulated(gather: bool) -> list[torch.Tensor]:
    """Gradients of micro-batches that are summed over ranks together, in precisions of their own."""
    model = sharded_model(BLOCKWISE, gather)
    for number, precision in enumerate((BLOCKWISE, BF16, other_codes(), FP32)):
        for linear in converted_linears(model):
            linear.set_precision(precision)
        model.set_requires_gradient_sync(number == 3)
        model(inputs() + number).square().mean().backward()
    return [weight.grad.full_tensor() for weight in model.parameters()]


def _evaluated_between(gather: bool) -> list[torch.Tensor]:
    """What an evaluation between forward and backward leaves alone."""
    model = sharded_model(BLOCKWISE, gather)
    y = model(inputs())
    with torch.no_grad():
        evaluated = model.eval()(inputs() * 2)
    model.train()
    y.square().mean().backward()
    return [y.detach(), evaluated, *(weight.grad.full_tensor() for weight in model.parameters())]


def _inferred(gather: bool) -> list[torch.Tensor]:
    """A training step after an evaluation in inference mode, the first to compute in that precision."""
    model = sharded_model(FP32, gather)
    model(inputs())  # or biases would come where inference mode keeps them from training, with FSDP2 alone too
    for linear in converted_linears(model):
        linear.set_precision(BLOCKWISE)
    with torch.inference_mode():
        evaluated = model(inputs()).clone()
    y = model(inputs())
    y.square().mean().backward()
    return [evaluated, y.detach(), *(weight.grad.full_tensor() for weight in model.parameters())]


def _whole_at_the_step(gather: bool) -> list[torch.Tensor]:
    """The root's linear stays whole after an evaluation, and FSDP2 goes on with its old weight, whatever is written."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU()), nn.Linear(INNER, WIDTH))
    convert_model(model, load_recipe("blockwise").document | {"rules": [{"match": "*", "use": "fp8"}]}, backend="cpu")
    fully_shard(model[0])
    fully_shard(model, reshard_after_forward=False)
    if gather:
        fp8train.gather_operands(model)
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), []
    for _ in range(3):
        y = model(inputs())
        y.square().mean().backward()
        seen.append(y.detach())
        with torch.no_grad():
            seen.append(model(inputs()))
        optimizer.step()
        optimizer.zero_grad()
    return seen


HABITS = {
    "moved": partial(_after, _moved), "assigned": partial(_after, _assigned),
    "written locally": partial(_after, _written_locally), "odd": partial(_after, _written_locally, inner=261),
    "without rows": partial(_after, _written_by_one, inner=1), "accumulated": _accumulated,
    "evaluated between": _evaluated_between, "inferred": _inferred, "whole at the step": _whole_at_the_step,
}  # fmt: skip


def _on_ranks(world):
    return {
        name: [torch.equal(a, b) for a, b in zip(results(True), results(False), strict=True)]
        for name, results in HABITS.items()
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(_on_ranks, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", HABITS)
def test_what_users_do_with_a_model_changes_no_number(ranks, name):
    assert all(len(result[name]) > 2 and all(result[name]) for result in ranks)
