"""From a run configuration to a model in its precision, with its first weights; and what its GEMMs ran in."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fp8train.backends.coverage import COUNTED, COUNTS, GEMMS, NOT_COUNTED, GemmCount
from fp8train.config import RunConfig
from fp8train.conversion_report import ConversionReport
from fp8train.convert import convert_model
from fp8train.distributed import World, wrap_ddp
from fp8train.distributed.sharding import lay_out, shard
from fp8train.hf_fp8 import packing_of
from fp8train.models import Decoder, ModelConfig, build_model, fill, hf_values, initial_values, read_config_json
from fp8train.nn.gathered import GatheredWeight, gather_weights
from fp8train.nn.gathered_operands import MASTER
from fp8train.nn.gathering import gather_masters, gather_operands
from fp8train.nn.weights import named_linears
from fp8train.quant.formats import BF16
from fp8train.recipe import Recipe, load_recipe
from fp8train.shards import local_bytes, whole

SPARE_GRAPHS = 8  # that a run may compile of its layers beside one for each: dynamo's own limit


@dataclass(kw_only=True, slots=True)
class Assembly:
    """A converted model on its device, the recipe, and what the conversion decided."""

    model: Decoder
    recipe: Recipe
    report: ConversionReport

    @property
    def all_bf16(self) -> bool:
        """Whether every linear runs in BF16 as it is."""
        return all(row.numbers == BF16 for row in self.report.rows)


def assemble(
    config: RunConfig,
    device: torch.device,
    *,
    recipe: Recipe | None = None,
    first_weights: bool = True,
    world_size: int = 1,
) -> Assembly:
    """Build, fill and convert the model of a run.

    Args:
        config: model, recipe, backend, fused, weight_copies, seed, activation_checkpointing, compile and parallel are
            read.
        device: where the model is to be; it is laid out there, never anywhere else first.
        recipe: None loads config.recipe.
        world_size: ranks that it will be spread over; where they shard it, it stays on the meta device, for `spread`.
        first_weights: fill it with first_values; False leaves that to a checkpoint.

    Raises:
        RecipeError: no such recipe, or it does not fit the model.
        BackendError: the backend cannot run here.
        CheckpointError: model.init_from cannot be read.
    """
    recipe = load_recipe(config.recipe) if recipe is None else recipe
    model = build_model(resolve_activations(config.model, recipe), device="meta")
    if not shards(config, world_size):
        model.to_empty(device=device)
        if first_weights:
            fill(model, first_values(model, config))
    choices = {"backend": config.backend, "fused": config.fused, "weight_copies": config.weight_copies}
    report = convert_model(model, recipe, device_type=device.type, **choices)
    model.checkpointing = config.activation_checkpointing
    if config.compile:
        _compile(model, by_layer=shards(config, world_size))
    return Assembly(model=model, recipe=recipe, report=report)


def first_values(model: Decoder, config: RunConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and values of each parameter before the first step: those of model.init_from, else drawn from the seed."""
    folder = config.model.init_from
    if folder is None:
        return initial_values(model, config.seed)
    return hf_values(model, folder, packing_of(read_config_json(folder), folder))


def _compile(model: Decoder, by_layer: bool) -> None:
    """Compile the model at its first forward, as one graph; or each layer, where they are gathered one by one."""
    if not by_layer:
        model.compile()
        return
    # every layer is a graph of its own of one function; beyond the process's limit, of 8, dynamo would run them eagerly
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, len(model.layers) + SPARE_GRAPHS)
    for layer in model.layers:
        layer.compile()


def shards(config: RunConfig, world_size: int) -> bool:
    """Whether each of so many ranks holds its rows of the parameters only."""
    return shard_ranks(config, world_size) > 1


def shard_ranks(config: RunConfig, world_size: int) -> int:
    """Ranks of so many that share out the rows of the parameters; 1 where each holds all of them."""
    if config.parallel.strategy != "fsdp" or world_size == 1:
        return 1
    return config.parallel.shard_ranks or world_size


def spread(model: Decoder, config: RunConfig, world: World, *, first_weights: bool = True) -> nn.Module:
    """The model as its ranks train it, by config.parallel.strategy: replicated in a wrapper, or sharded in place.

    One on the meta device gets memory and, unless a checkpoint brings them, first weights, of which no rank but the
    first ever has all.

    Raises:
        ConfigError: this torch's FSDP2 has other parts than those that are asked for what is gathered.
        CheckpointError: model.init_from cannot be read.
    """
    if not shards(config, world.world_size):
        return wrap_ddp(model, world)
    gather_weights(model, model.layers)
    how = config.parallel
    in_memory = not next(model.parameters()).is_meta
    sharded = shard(model, model.layers, world, how.shard_ranks, how.reshard_after_forward)
    if not in_memory and first_weights:
        lay_out(model, first_values(model, config), world)
    elif not in_memory:
        model.to_empty(device=world.device)
    if how.gather == "operands":
        gather_operands(model)
    else:
        gather_masters(model)
    return sharded


def resolve_activations(model: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The configuration with activations=auto replaced: float32 where every rule says fp32, else bfloat16."""
    if model.activations != "auto":
        return model
    all_fp32 = all(rule.use == "fp32" for rule in recipe.rules)
    return dataclasses.replace(model, activations="float32" if all_fp32 else "bfloat16")


def parameter_hash(model: nn.Module, wanted: bool = True) -> str:
    """SHA-256 over name, shape and bits of every parameter, in the order of their names.

    Every rank of a sharded model must call it; those that do not want it get that of nothing, without the work.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = whole(parameter.detach())
        if wanted:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def agreed_hash(model: nn.Module, world: World) -> str:
    """parameter_hash on every rank, of rank 0's weights."""
    return world.broadcast_object(parameter_hash(model, wanted=world.main), patient=True)


def model_hash(model: ModelConfig) -> str:
    """SHA-256 over what fixes the function that is trained: all but names and the dtype of activations."""
    fields = dataclasses.asdict(model)
    for name in ("name", "init_from", "activations"):
        del fields[name]
    return hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()


def memory_by_kind(assembly: Assembly, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that training holds on this rank from step to step, by kind."""
    weights = list(assembly.model.parameters())
    moments = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    own_codes, without = 0, []
    for fqn, linear in named_linears(assembly.model).items():
        if not isinstance(provider := linear.provider, GatheredWeight):
            continue
        own_codes += 0 if provider.gathered is None else provider.gathered.held_bytes
        from_master = provider.gathered is None or provider.gathered.form == MASTER
        without += [] if provider.keeps and from_master else [fqn]
    return {
        "weights": local_bytes(weights),
        "gradients": local_bytes(weight for weight in weights if weight.requires_grad),
        "moments": local_bytes(moments),
        "weight_copies": assembly.report.copy_bytes(without) + own_codes,
    }


class CoverageLog:
    """What the GEMMs of training ran in on all ranks, counted at run time; evaluation is left out.

    Args:
        report: of the conversion.
        ranks: each of which does as much as this one, and in the same precisions.
    """

    def __init__(self, report: ConversionReport, ranks: int = 1) -> None:
        self._report = report
        self._ranks = ranks
        self._counts: dict[int, dict[str, GemmCount]] = {}  # of all ranks, however many they were
        COUNTS.reset()

    def pause(self) -> None:
        """Take the counts so far; what follows does not count until `resume`."""
        for site, gemms in COUNTS.snapshot().items():
            own = self._counts.setdefault(site, {})
            own |= {gemm: own.get(gemm, GemmCount()).plus(ran, self._ranks) for gemm, ran in gemms.items()}

    def resume(self) -> None:
        """Count again."""
        COUNTS.reset()

    def total(self) -> dict[str, Any]:
        """The content of coverage.json, as of the last `pause`."""
        return self._report.coverage(self._counts)

    def counts(self) -> dict[str, dict[str, list[int]]]:
        """What was counted so far, for a checkpoint: {module path: {GEMM: the counts in the order of COUNTED}}."""
        self.pause()
        self.resume()
        rows = self.total()["linears"]
        return {row["fqn"]: {gemm: [row["gemms"][gemm][key] for key in COUNTED] for gemm in GEMMS} for row in rows}

    def go_on(self, counts: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Count on from what `counts` gave; steps since then were undone, or another process made those before."""
        COUNTS.reset()
        self._counts = {
            row.site: {gemm: GemmCount(*numbers) for gemm, numbers in counts.get(row.fqn, {}).items()}
            for row in self._report.rows
            if row.site != NOT_COUNTED
        }
