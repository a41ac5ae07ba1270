"""FSDP2 on one rank, with the kernels of whatever device is here; several ranks are in tests/integration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from fp8train.convert import convert_model
from fp8train.distributed import World
from fp8train.distributed.sharding import gathered_layers, lay_out, shard, shard_bytes
from fp8train.models import ModelConfig, build_model, initial_values, initialize
from fp8train.nn.gathered import gather_weights
from fp8train.nn.gathering import gather_operands
from fp8train.recipe import load_recipe
from fp8train.shards import is_sharded, whole
from fp8train.trainer.assembly import Assembly, memory_by_kind
from tests.hardware import devices
from tests.recipe_documents import rows_everywhere

CONFIG = ModelConfig(
    name="small", vocab_size=200, hidden_size=256, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=384,
    max_seq_len=128, activations="bfloat16",
)  # fmt: skip


@pytest.fixture(params=devices())
def world(request) -> Iterator[World]:
    """A process group of this process."""
    backend = "cpu:gloo,cuda:nccl" if request.param == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(device=torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def gradients(world: World, gather: str | None, steps: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of some steps, and the gradients of the last; gather: parallel.gather, None where nothing is sharded.

    What gathers operands is sharded before it has memory.
    """
    as_shards = gather == "operands"
    model = build_model(CONFIG, "meta" if as_shards else world.device)
    if not as_shards:
        initialize(model, 1)
    convert_model(model, "blockwise", fused="always", device_type=world.device.type)
    if gather is not None:
        gather_weights(model, model.layers)
        shard(model, model.layers, world)
        assert is_sharded(model.parameters())
    if as_shards:
        lay_out(model, initial_values(model, 1), world)
        gather_operands(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 129), generator=torch.Generator().manual_seed(2)).to(world.device)
    losses = []
    for step in range(steps):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        (loss / 256).backward()
        losses.append(loss.detach())
        if step + 1 < steps:
            optimizer.step()
            optimizer.zero_grad()
    return losses, {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("gather", ["operands", "fp32"])
def test_a_sharded_model_computes_what_it_did_bit_for_bit(world: World, gather: str):
    """Three steps: the second and third read operands of weights that the optimizer has moved."""
    (want_losses, want), (losses, got) = (gradients(world, how, 3) for how in (None, gather))
    assert want_losses[0] > want_losses[2]
    assert losses == want_losses
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_bytes_are_those_of_the_fullest_rank():
    shapes = [torch.Size([10, 3]), torch.Size([2]), torch.Size([0, 5])]
    assert shard_bytes(shapes, 4, 4) == 4 * (3 * 3 + 1)  # of 10 rows 3, 3, 3 and 1; of 2 one


def test_what_lm_head_keeps_of_its_master_is_counted(world: World):
    model, recipe = build_model(CONFIG, "meta"), load_recipe(rows_everywhere())
    report = convert_model(model, recipe, device_type=world.device.type)
    gather_weights(model, model.layers)
    shard(model, model.layers, world)
    gather_operands(model)
    (head,) = (row for row in report.rows if row.fqn == "lm_head")
    held = memory_by_kind(Assembly(model=model, recipe=recipe, report=report), torch.optim.AdamW(model.parameters()))
    assert held["weight_copies"] == head.code_bytes + head.scale_bytes > 0


def test_layers_are_the_longest_list():
    model = build_model(CONFIG, "meta")
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    every = sum(p.numel() for p in model.parameters())
    assert gathered_layers(model) == ("layers", 4 * every, 4 * every)
    assert gathered_layers(torch.nn.Linear(3, 5)) == ("", 4 * 20, 4 * 20)
    heads = model.lm_head.weight
    assert gathered_layers(model, {id(heads): 1}) == ("layers", 4 * every - 3 * heads.numel(), 4 * every)
    assert sizes[0] == sizes[1]
