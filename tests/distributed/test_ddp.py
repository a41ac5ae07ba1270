"""Gradients summed over ranks, in FP32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8train.convert import convert_model
from fp8train.distributed import World, gradient_sync, unwrap, wrap_ddp
from fp8train.nn.weights import weights_changed
from tests.distributed.ranks import run_ranks

RANKS = 3  # not a power of two: a mean in place of a sum would cost a rounding and change the scale of dy
SAMPLES = 12


class Probe(nn.Module):
    """Two linears that note the gradient which reaches the first one's output; with buffers that gloo cannot move."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        self.register_buffer("codes", torch.zeros(4).to(torch.float8_e4m3fn), persistent=False)
        self.dy: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y.register_hook(self.dy.append)
        return self.second(y.tanh()).square().sum()


def _samples():
    return torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(1))


def _gradients(world, *, micro_batches=1, model_seed=0):
    """Gradients of the mean over all samples; each rank has its part, in some micro-batches."""
    torch.manual_seed(model_seed)
    inner = Probe()
    model = wrap_ddp(inner, world)
    parts = _samples().chunk(world.world_size)[world.rank].chunk(micro_batches)
    for number, part in enumerate(parts, start=1):
        with gradient_sync(model, number == micro_batches):
            (model(part) / SAMPLES).backward()
    assert unwrap(model) is inner
    return {name: p.grad.clone() for name, p in inner.named_parameters()}, torch.cat(inner.dy)


def _on_ranks(world):
    after_one, dy = _gradients(world)
    after_two, _ = _gradients(world, micro_batches=2)
    other_start, _ = _gradients(world, model_seed=world.rank)  # rank 0's weights count
    return {"one": after_one, "two": after_two, "other_start": other_start, "dy": dy}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(_on_ranks, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["first.weight", "first.bias", "second.weight", "second.bias"])
@pytest.mark.parametrize("case", ["one", "two", "other_start"], ids=["one_batch", "accumulated", "seeds_differ"])
def test_gradient_of_several_ranks_is_that_of_one(ranks, case, name):
    want = _gradients(World())[0][name]
    for result in ranks:
        got = result[case][name]
        assert got.dtype == torch.float32
        # a sum of 12 products in another order: 12 * 2^-24 of the largest term, which is below 4
        torch.testing.assert_close(got, want, rtol=0, atol=4 * SAMPLES * 2.0**-24)


def test_every_rank_holds_the_same_bits(ranks):
    for name, value in ranks[0]["one"].items():
        assert all(torch.equal(result["one"][name], value) for result in ranks[1:])


def test_dy_of_a_sample_has_the_same_bits_on_any_number_of_ranks(ranks):
    """Hence the same FP8 codes: a mean over ranks would need dy scaled by their number."""
    assert torch.equal(torch.cat([result["dy"] for result in ranks]), _gradients(World())[1])


def test_world_of_one_gets_the_model_itself():
    model = Probe()
    assert wrap_ddp(model, World()) is model
    assert unwrap(model) is model


def _plain_ddp(world):
    torch.manual_seed(world.rank)
    model = nn.Sequential()
    model.layers = nn.Sequential(nn.Linear(128, 136), nn.ReLU(), nn.Linear(136, 8))
    convert_model(model, "blockwise", backend="cpu")
    replicated = nn.parallel.DistributedDataParallel(nn.Sequential(model))  # broadcasts parameters and buffers
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    first = replicated(x)
    weights_changed(model)
    return first.detach(), model(x.clone()).detach()


def test_torch_s_own_ddp_takes_a_converted_model(tmp_path):
    results = run_ranks(_plain_ddp, 2, tmp_path)
    for first, anew in results:
        assert torch.equal(first, anew) and torch.equal(first, results[0][0])
