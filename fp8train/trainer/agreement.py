"""What every rank of a run must have the same: the command, the versions, the data and how each linear is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import fp8train
from fp8train.arguments import flattened
from fp8train.config import RunConfig, config_to_dict
from fp8train.data import Dataset, build_dataset, check_model_tokenizer, check_vocabulary
from fp8train.distributed import World, init
from fp8train.distributed.agreement import check_same, on_every_rank
from fp8train.distributed.world import TIMEOUT_SECONDS
from fp8train.errors import UserError
from fp8train.recipe import load_recipe
from fp8train.trainer.assembly import Assembly, assemble
from fp8train.trainer.evaluation import EvalSet

# Each rank has its own clock; they agree in every step on whether to stop or to save.
# Data may lie elsewhere on each machine, if its fingerprint is the same.
OF_EACH_RANK = ("time_limit_seconds", "checkpoint.minutes", "data.path")


@contextmanager
def joined(load: Callable[[], RunConfig]) -> Iterator[tuple[RunConfig, World]]:
    """The configuration and, inside, the ranks, who need not wait for one that cannot load its own.

    Raises:
        UserError: on every rank, what `load` raised on some; what `init` raises.
    """
    loaded: list[RunConfig] = []
    refusal: UserError | None = None
    try:
        loaded.append(load())
    except UserError as error:
        refusal = error

    def config() -> RunConfig:
        if refusal is not None:
            raise refusal
        return loaded[0]

    with init(loaded[0].parallel.timeout_seconds if loaded else TIMEOUT_SECONDS) as world:
        yield on_every_rank(world, config), world


def check_same_command(config: RunConfig, world: World) -> None:
    """Refuse ranks that were started with other settings, recipes or versions; before anything else that ranks share.

    Raises:
        ConfigError: on every rank; names the key, both values and the ranks.
    """
    if world.world_size == 1:
        return
    settings = {key: value for key, value in flattened(config_to_dict(config)).items() if key not in OF_EACH_RANK}
    recipes = dict.fromkeys([config.recipe, *(config.compare.arms or ())])
    facts = {
        "fp8train": fp8train.__version__,
        "torch": torch.__version__,
        "ranks": world.world_size,
        "device": world.device.type,
        **settings,
        **{f"the meaning of recipe {source}": _recipe_hash(source) for source in recipes},
    }
    check_same(world, facts, "Give every node the same command, recipe files and versions.")


def _recipe_hash(source: str) -> str:
    """Of its meaning; why it cannot be read, which is an error of its own where that is so on every rank."""
    try:
        return load_recipe(source).hash[:12]
    except UserError as error:
        return f"none, as {error}"


def agreed_dataset(config: RunConfig, world: World) -> Dataset:
    """The data of a run, which serves its model and is the same on every rank.

    Raises:
        DataError: some rank cannot read it, or it does not serve.
        ConfigError: the ranks have other text, tokenizers or splits.
    """

    def build() -> Dataset:
        dataset = build_dataset(config.data, config.seq_len, config.seed)
        check_model_tokenizer(dataset.tokenizer, config.data, config.model.init_from)
        check_vocabulary(dataset, config.model.vocab_size, config.model.init_from)
        return dataset

    dataset = on_every_rank(world, build)
    facts = {"the fingerprint of the data": dataset.fingerprint[:12]}
    check_same(world, facts, "Give every node the same text, tokenizer and split, best on a file system they share.")
    return dataset


def agreed_assembly(config: RunConfig, world: World, eval_set: EvalSet | None, *, first_weights: bool) -> Assembly:
    """The model of a run, whose linears are computed the same way on every rank.

    Args:
        eval_set: held-out windows that every rank must have the same; None where nothing is held out.
        first_weights: see `assemble`.

    Raises:
        UserError: as `assemble`, of whichever rank.
        ConfigError: the ranks have other backends or precisions for a linear, or other held-out windows.
    """
    ranks = world.world_size
    assembly = on_every_rank(
        world, lambda: assemble(config, world.device, world_size=ranks, first_weights=first_weights)
    )
    facts = {"the hash of the held-out windows": None if eval_set is None else eval_set.hash[:12]}
    facts |= {row.fqn: f"{row.precision} by {row.backend}" for row in assembly.report.rows}
    facts |= {row.fqn: "plain" if row.refusal else "fused" for row in assembly.report.producers}
    check_same(world, facts, "Run on machines that are alike, or name a backend that all of them have: backend=NAME.")
    return assembly
