"""Parameters sharded over two ranks of four, which two groups hold alike (parallel.shard_ranks=2)."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # takes seconds, and is loaded here once for all ranks

from fp8train.checkup.subject import KeepGradients
from fp8train.data import Batch, Batcher, build_dataset
from fp8train.distributed import World
from fp8train.metrics import read_metrics
from fp8train.quant.formats import BLOCKWISE
from fp8train.recipe import load_recipe
from fp8train.shards import local
from fp8train.trainer import Trainer
from fp8train.trainer.assembly import assemble, spread
from fp8train.trainer.console import Console
from fp8train.trainer.step import inputs, train_step
from tests.distributed.ranks import run_ranks
from tests.distributed.test_gathered_operands import refused, sharded_model
from tests.tiny_run import tiny_config

MESHES = {"ddp": ("parallel=ddp",), "all": ("parallel=fsdp",), "hybrid": ("parallel=fsdp", "parallel.shard_ranks=2")}
# of 259 rows the ranks of a group have 130 and 129, which cuts a block of 128; of 9 windows the ranks have 3, 2, 2, 2
SHAPE = ("model.intermediate_size=259", "data.eval_windows=9", "optim=adamw_constant", "optim.lr=3e-3")
RUN = ("checkpoint.every=1", "checkpoint.keep_last=9", "eval.every=2", "optim.clip_grad_norm=0.1")
CASES = [("ddp", 2), ("all", 2), ("all", 1), ("hybrid", 2), ("hybrid", 1)]  # mesh and size of a micro-batch, of two
RECIPE = "smooth.yaml"  # scales channels by rows of all ranks of a group
FILES = ("model.safetensors", "optimizer.safetensors")
TIMEOUT_SECONDS = 60  # of init in tests/distributed/ranks.py


def own_gradients(model: torch.nn.Module, batch: Batch, tokens: int) -> dict[str, torch.Tensor]:
    """What this rank alone adds to the gradient of a step of so many tokens."""
    model.zero_grad()
    (model(*inputs(batch, torch.device("cpu"))) * (1.0 / tokens)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def of_every_rank(tensor: torch.Tensor) -> list[torch.Tensor]:
    every = [torch.empty_like(tensor) for _ in range(4)]
    dist.all_gather(every, tensor.contiguous())
    return every


def wanted_gradients(model: torch.nn.Module, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Two ranks, then their micro-batches, then two groups: no sum has more than two terms, so each has one result."""
    parts = [own_gradients(model, batch, 512) for batch in batches]
    wanted = {}
    for name in parts[0]:
        ranks = zip(*(of_every_rank(part[name]) for part in parts), strict=True)
        a, b, c, d = map(list, ranks)
        groups = [[one + other for one, other in zip(*pair, strict=True)] for pair in ((a, b), (c, d))]
        wanted[name] = reduce(torch.add, groups[0]) + reduce(torch.add, groups[1])
    return wanted


def first_step(folder: Path, world: World, mesh: str, micro_batch: int) -> dict[str, Any]:
    """Gradients of the first step against those that they are to be, and how long its collectives wait."""
    recipe = f"recipe={folder / RECIPE}"
    config = tiny_config(folder, *SHAPE, *MESHES[mesh], recipe, f"micro_batch_samples={micro_batch}")
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    batcher = Batcher(dataset, config.global_batch_samples, micro_batch, world.rank, world.world_size)
    model = assemble(config, world.device).model
    wanted = wanted_gradients(model, batcher.micro_batches(0))
    model = assemble(config, world.device, world_size=4).model
    replica = spread(model, config, world)
    optimizer = KeepGradients(model)
    result = train_step(replica, optimizer, batcher.micro_batches(0), world, clip=None)
    norm = torch.stack([gradient.double().norm() for gradient in wanted.values()]).norm()
    apart = {
        name: float((wanted[name] - own).norm() / wanted[name].norm()) for name, own in optimizer.gradients.items()
    }
    groups = [] if mesh == "ddp" else next(model.parameters()).device_mesh.get_all_groups()
    waits = [group._get_backend(world.device).options._timeout.total_seconds() for group in groups]
    return {
        "loss": result.loss, "norm": result.grad_norm / float(norm), "tokens": result.valid_tokens, "waits": waits,
        "groups": len(dist.distributed_c10d._world.pg_map),
        "different": [name for name in wanted if not torch.equal(wanted[name], optimizer.gradients[name])],
        "apart": max(apart.values()), "gradients": len(apart),
        "rows": local(model.layers[0].mlp.up_proj.weight).shape[0],
    }  # fmt: skip


def trained(folder: Path, world: World, mesh: str, steps: int, run: str, *overrides: str) -> list[torch.Tensor]:
    """A run, which goes on where the folder has one; this rank's rows of its weights."""
    options = (*SHAPE, *MESHES[mesh], *RUN, f"recipe={folder / RECIPE}", f"steps={steps}", *overrides)
    console = Console(enabled=False)
    said: list[str] = []
    console.info = said.append  # type: ignore[method-assign]
    trainer = Trainer(tiny_config(folder, *options, run=run), world, console)
    trainer.run()
    if world.main:
        (folder / run / f"said_{mesh}.json").write_text(json.dumps(said))
    return [local(parameter.detach()).clone() for parameter in trainer.model.parameters()]


def _on_ranks(world: World) -> dict[str, Any]:
    folder = Path(world.broadcast_object(tempfile.mkdtemp() if world.main else ""))
    if world.main:
        tiny_config(folder)  # writes the text
        treated = load_recipe("blockwise").document | {"swiglu": {"clamp": 0.02, "smooth": True}}
        (folder / RECIPE).write_text(json.dumps(treated))
    dist.barrier()
    steps = {case: first_step(folder, world, *case) for case in CASES}
    weights = trained(folder, world, "hybrid", 3, "hybrid")
    half = folder / "hybrid" / "checkpoints" / "step_00000002"
    for mesh in ("ddp", "all"):
        trained(folder, world, mesh, 2, mesh, f"resume={half}")  # reads it and writes its own
        trained(folder, world, "hybrid", 3, mesh)
    message = refused(lambda: sharded_model(BLOCKWISE, True, reshard_after_forward=2))
    return {"folder": folder, "steps": steps, "weights": weights, "refusal": message}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[list[dict[str, Any]]]:
    found = run_ranks(_on_ranks, 4, tmp_path_factory.mktemp("hybrid"))
    yield found
    shutil.rmtree(found[0]["folder"])


@pytest.fixture(scope="module")
def folder(ranks) -> Path:
    return ranks[0]["folder"]


@pytest.mark.parametrize("micro_batch", [2, 1], ids=["one", "accumulated"])
def test_gradients_are_the_sum_over_all_ranks_bit_for_bit(ranks, micro_batch):
    """Two micro-batches are added up within a group before the groups are: in any other order the bits are others."""
    for outcome in (rank["steps"]["hybrid", micro_batch] for rank in ranks):
        assert outcome["gradients"] == 12 and outcome["different"] == []
        assert outcome["loss"] == ranks[0]["steps"]["all", micro_batch]["loss"] and outcome["tokens"] == 512


@pytest.mark.parametrize(("mesh", "micro_batch"), CASES)
def test_gradients_are_close_to_those_of_every_mesh(ranks, mesh, micro_batch):
    """Sums of the same four or eight FP32 terms in another order: at most seven additions, each rounds by 2^-24."""
    for outcome in (rank["steps"][mesh, micro_batch] for rank in ranks):
        assert outcome["apart"] <= 7 * 2**-24
        # each piece of 2^14 elements has a norm in FP32, of at most 2^14 / 16 roundings in a lane of sixteen; then FP64
        assert outcome["norm"] == pytest.approx(1, rel=2**10 * 2**-24)


def test_a_rank_holds_its_rows_in_its_group(ranks):
    assert [rank["steps"]["hybrid", 2]["rows"] for rank in ranks] == [130, 129, 130, 129]


def test_groups_wait_as_long_as_the_run_was_told(ranks):
    """Torch's own are half an hour for gloo, ten minutes for NCCL."""
    assert ranks[0]["steps"]["all", 2]["waits"] == [TIMEOUT_SECONDS]
    assert ranks[0]["steps"]["hybrid", 2]["waits"] == [TIMEOUT_SECONDS] * 2


def test_models_that_are_sharded_alike_share_their_groups(ranks):
    """Each group of NCCL's keeps memory of the GPU."""
    steps = ranks[0]["steps"]
    assert steps["all", 1]["groups"] + 2 == steps["hybrid", 2]["groups"] == steps["hybrid", 1]["groups"]


def test_groups_hold_the_same_weights_after_steps_that_were_clipped(ranks):
    norms = [row["grad_norm"] for row in read_metrics(ranks[0]["folder"] / "hybrid/metrics.jsonl") if "loss" in row]
    assert len(norms) == 3 and min(norms) > 0.1
    for one, other in ((0, 2), (1, 3)):
        assert all(map(torch.equal, ranks[one]["weights"], ranks[other]["weights"]))
    assert not torch.equal(ranks[0]["weights"][0], ranks[1]["weights"][0])


@pytest.mark.parametrize("mesh", ["ddp", "all"])
def test_a_checkpoint_is_the_same_file_whatever_the_mesh(folder, mesh):
    """Read and written by another mesh it keeps its bytes, and a hybrid run goes on from that as from its own."""
    for step in (2, 3):
        for name in FILES:
            one, other = (folder / run / "checkpoints" / f"step_{step:08d}" / name for run in ("hybrid", mesh))
            assert one.read_bytes() == other.read_bytes(), (step, name)


@pytest.mark.parametrize("mesh", ["ddp", "all"])
def test_evaluation_is_the_same_whatever_the_mesh(folder, mesh):
    one, other = (
        next(row for row in read_metrics(folder / run / "metrics.jsonl") if "eval_loss" in row and row["step"] == 2)
        for run in ("hybrid", mesh)
    )
    for key in ("eval_loss", "eval_loss_bf16", "eval_tokens"):
        assert one[key] == other[key], key


def test_a_resume_says_what_is_sharded_otherwise(folder):
    said = {mesh: "\n".join(json.loads((folder / mesh / "said_hybrid.json").read_text())) for mesh in MESHES}
    assert "on 4 ranks, parameters sharded over 2\n" in said["hybrid"]
    for mesh in ("ddp", "all"):
        assert "parallel.shard_ranks: null -> 2 from step 3" in said[mesh]
        assert ("parallel.strategy: ddp -> fsdp from step 3" in said[mesh]) == (mesh == "ddp")


def test_operands_that_forward_would_leave_to_fewer_ranks_are_refused(ranks):
    assert all("reshard_after_forward is a number of ranks; needs True or False" in rank["refusal"] for rank in ranks)
