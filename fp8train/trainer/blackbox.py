"""Black box: what a step was made of is written down when its loss is not finite, or leaps, so that it can be replayed.

run_dir/blackbox/step_%08d/ holds dump.json (Dump), and for each rank its micro-batches and generators. A step that was
not finite moved no weight, so the weights are those of the step and lie beside it; a spike is seen after the update, so
`fp8train replay` trains to it again from the nearest earlier checkpoint, or from the first weights.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8train.checkpoint.files import FolderWriter, read_json, read_tensors
from fp8train.checkpoint.random_state import random_state
from fp8train.config import RunConfig, config_to_dict
from fp8train.data import Batch
from fp8train.distributed import World
from fp8train.distributed.agreement import ranks_text
from fp8train.errors import CheckpointError
from fp8train.nn.weights import named_linears
from fp8train.shards import is_sharded, whole
from fp8train.spikes import spike_limit
from fp8train.trainer.assembly import Assembly
from fp8train.trainer.step import StepResult
from fp8train.trainer.watcher import Watcher
from fp8train.units import finite

FOLDER = "blackbox"
DUMP_FILE = "dump.json"
WEIGHTS_FILE = "model.safetensors"
NEW_LEVEL = 0.4  # share of the last `window` steps; where more of them are spikes, they are none
GRADIENT_LEAP = 30.0  # times the geometric mean of the last `window` norms: a leap that is no part of ordinary noise
LEAST_NORM = 1e-30  # for the logarithm of a norm that is 0
MOST_DOUBLINGS = 10  # of the quiet time after a dump


@dataclass(kw_only=True, slots=True)
class Dump:
    """What happened, beside the micro-batches.

    step: counted from 1. kind: "nonfinite" or "spike" (as fp8train/spikes.py says).
    loss, grad_norm: of the step; null where not finite.
    limit: loss above which it is a spike; null with too little history.
    history: losses of the steps before, oldest first.
    world_size: ranks that have files here.
    weights: whether model.safetensors holds those of the step.
    precisions: name of the precision of each linear whose precision is not its rule's.
    statistics: largest magnitude, rms and non-finite elements of each parameter, and of each micro-batch's tokens.
    config, recipe_document: of the run.
    """

    step: int
    kind: str
    loss: float | None
    grad_norm: float | None
    limit: float | None
    history: list[float]
    world_size: int
    weights: bool
    precisions: dict[str, str]
    statistics: dict[str, Any]
    config: dict[str, Any]
    recipe_document: dict[str, Any]
    format: str = "fp8train black box 1"


@dataclass(kw_only=True, slots=True)
class RankDump:
    """One rank's part: micro-batches as it was fed them, and its generators before the step."""

    batches: list[Batch] = field(default_factory=list)
    random_state: dict[str, str] = field(default_factory=dict)


class BlackBox(Watcher):
    """Watcher: keeps what the step in hand is made of, and writes it down when the step goes wrong.

    Args:
        config: blackbox is read; all of it goes into a dump.
        warn: takes one line for each dump.
    """

    name = "blackbox"

    def __init__(
        self, config: RunConfig, assembly: Assembly, world: World, run_dir: Path, warn: Callable[[str], None]
    ) -> None:
        self._config, self._assembly, self._world, self._warn = config, assembly, world, warn
        self._folder = run_dir / FOLDER
        self._history: list[float] = []
        self._spikes: list[int] = []  # steps
        self._norms: list[float] = []  # logarithms of gradient norms
        self._norm_quiet_until = 0
        self._dumps = 0
        self._newest: str | None = None  # name of the last dump, which makes room for the next beyond `keep`
        self._quiet_until = 0
        self._rank = RankDump()

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Keep micro-batches and generators."""
        self._rank = RankDump(batches=list(batches), random_state=random_state())

    def after_step(self, step: int, result: StepResult) -> dict[str, Any]:
        """Write a dump, if the step went wrong, not too soon after the last; the same decision on every rank."""
        limit = spike_limit(self._history, self._config.blackbox.spike_sigmas)
        kind = "nonfinite" if not result.updated else "spike" if limit is not None and result.loss > limit else None
        if result.updated:
            self._follow(step, result, spike=kind is not None)
        if kind is None or step < self._quiet_until:
            return {}
        what = "a step that is not finite" if kind == "nonfinite" else f"loss {result.loss:.4g}, above {limit:.4g}"
        if result.bad_ranks:
            what += f", by the loss of {ranks_text(result.bad_ranks)}"
        # a run that has diverged needs no dump of each step, and with each beyond `keep` they come more rarely
        late = max(0, self._dumps + 1 - self._config.blackbox.keep)
        self._quiet_until = step + self._config.blackbox.window * 2 ** min(late, MOST_DOUBLINGS)
        path = self._folder / f"step_{step:08d}"
        self._dumps += 1
        failed = self._write(path, step, kind, result, limit)
        if failed is not None:
            self._warn(f"{what}: black box {path} cannot be written ({failed}); training goes on without it")
            return {}
        if late and self._newest not in (None, path.name) and self._world.main:
            shutil.rmtree(self._folder / str(self._newest), ignore_errors=True)
        self._newest = path.name
        self._warn(f"{what}: black box {path}; `fp8train replay {path}` names the cause")
        return {"blackbox": kind}

    def _follow(self, step: int, result: StepResult, *, spike: bool) -> None:
        """Take in the loss of a step; a level that holds is the usual one from then on, spikes are not."""
        window = self._config.blackbox.window
        self._spikes = [one for one in [*self._spikes, *([step] if spike else [])] if one > step - window]
        if not spike:
            self._history = [*self._history, result.loss][-window:]
        elif len(self._spikes) > NEW_LEVEL * window:
            self._history, self._spikes = [], []
            share = f"more than {NEW_LEVEL:.0%} of the last {window} losses lay far above the usual level"
            self._warn(f"step {step}: {share}; what is usual is learned anew")
        usual = math.exp(statistics.fmean(self._norms)) if len(self._norms) == window else math.inf
        norm = result.grad_norm
        if norm > GRADIENT_LEAP * usual and step >= self._norm_quiet_until:
            self._norm_quiet_until = step + window
            self._warn(f"step {step}: gradient norm {norm:.3g} before clipping, usually {usual:.3g}")
        self._norms = [*self._norms, math.log(max(norm, LEAST_NORM))][-window:]

    def _write(self, path: Path, step: int, kind: str, result: StepResult, limit: float | None) -> str | None:
        """Write a dump; why that was not possible, the same on every rank, and then nothing is left of it."""
        parameters: dict[str, Tensor] = dict(self._assembly.model.named_parameters())
        size = sum(p.numel() * p.element_size() for p in parameters.values())
        keep_weights = kind == "nonfinite" and size <= self._config.blackbox.weights_gib * 2**30
        if keep_weights and self._world.main:  # they must leave room for a checkpoint, weights and moments
            keep_weights = self._folder.parent.is_dir() and shutil.disk_usage(self._folder.parent).free > 4 * size
        failed = self._all_wrote(path, lambda: self._write_rank(path))
        if failed is not None:
            return failed
        described = {}
        for name, own in parameters.items():
            parameter = whole(own.detach())  # of every rank
            described[name] = tensor_statistics(parameter) if self._world.main else {}
            if keep_weights and self._world.main and is_sharded([own]):
                parameters[name] = parameter.cpu()  # one by one: whole, they need not fit on a device
        dump = Dump(
            step=step,
            kind=kind,
            loss=finite(result.loss),
            grad_norm=finite(result.grad_norm),
            limit=limit,
            history=self._history,
            world_size=self._world.world_size,
            weights=keep_weights,
            precisions=self._changed_precisions(),
            statistics={
                "parameters": described,
                "micro_batches": [token_statistics(batch) for batch in self._rank.batches],
                "bad_ranks": list(result.bad_ranks),
            },
            config=config_to_dict(self._config),
            recipe_document=self._assembly.recipe.document,
        )

        def write_main() -> None:
            writer = FolderWriter(path)
            if keep_weights:
                writer.write_tensors(WEIGHTS_FILE, parameters, {"format": "pt"})
            writer.write_json(DUMP_FILE, asdict(dump))

        return self._all_wrote(path, write_main if self._world.main else lambda: None)

    def _changed_precisions(self) -> dict[str, str]:
        rules = {row.fqn: row.numbers for row in self._assembly.report.rows}
        linears = named_linears(self._assembly.model).items()
        return {fqn: linear.precision.name for fqn, linear in linears if linear.precision != rules[fqn]}

    def _write_rank(self, path: Path) -> None:
        self._folder.mkdir(exist_ok=True)  # not the run folder itself: where that is gone another run may come
        path.mkdir(exist_ok=True)
        write_rank(FolderWriter(path), self._world.rank, self._rank)

    def _all_wrote(self, path: Path, write: Callable[[], None]) -> str | None:
        """Why some rank could not write, or None; the folder is removed then."""
        failed = None
        try:
            write()
        except OSError as error:
            failed = str(error.strerror or error)
        first = next((reason for reason in self._world.all_gather_object(failed) if reason is not None), None)
        if first is not None and self._world.main:
            shutil.rmtree(path, ignore_errors=True)  # what is there in part takes room that a checkpoint needs
        return first

    def state(self) -> dict[str, Any]:
        """What is usual, and the dumps."""
        usual = {"history": self._history, "spikes": self._spikes, "norms": self._norms}
        return usual | {"dumps": self._dumps, "newest": self._newest, "quiet_until": self._quiet_until}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._take_back(state)
        self._dumps = state.get("dumps", 0)
        there = sorted(path.name for path in self._folder.glob("step_*"))
        self._newest = state.get("newest", there[-1] if there else None)
        self._quiet_until = state.get("quiet_until", 0)

    def roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Take back what is usual; the dumps stay, and a step that is made again does not write over its own."""
        self._take_back(state)

    def _take_back(self, state: dict[str, Any]) -> None:
        self._history = list(state.get("history", ()))
        self._spikes = list(state.get("spikes", ()))
        self._norms = list(state.get("norms", ()))


def tensor_statistics(x: Tensor) -> dict[str, Any]:
    """amax and rms of the finite elements, and how many are not finite."""
    usable = torch.where(x.isfinite(), x, torch.zeros_like(x)).float()
    amax = float(usable.abs().max()) if x.numel() else 0.0
    rms = float(usable.square().mean().sqrt()) if x.numel() else 0.0
    return {"amax": finite(amax), "rms": finite(rms), "nonfinite": int((~x.isfinite()).sum())}


def token_statistics(batch: Batch) -> dict[str, Any]:
    """Sequences of a micro-batch, and how many different tokens each has: a broken document often has few."""
    return {"sample_ids": batch.sample_ids, "distinct_tokens": [int(row.unique().numel()) for row in batch.tokens]}


def write_rank(writer: FolderWriter, rank: int, part: RankDump) -> None:
    """rank_%04d.json and rank_%04d.safetensors."""
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(part.batches):
        tensors |= {f"tokens.{number}": batch.tokens, f"targets.{number}": batch.targets}
        if batch.document_ids is not None:
            tensors[f"document_ids.{number}"] = batch.document_ids
    writer.write_tensors(f"rank_{rank:04d}.safetensors", tensors, {"format": "pt"})
    ids = [batch.sample_ids for batch in part.batches]
    writer.write_json(f"rank_{rank:04d}.json", {"sample_ids": ids, "random_state": part.random_state})


def read_dump(path: Path) -> tuple[Dump, list[RankDump]]:
    """A dump and the parts of its ranks.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    content = read_json(path / DUMP_FILE)
    try:
        dump = Dump(**content)
        return dump, [_read_rank(path, rank) for rank in range(dump.world_size)]
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: is no whole black box ({error}); needs one that a run wrote.") from error


def _read_rank(path: Path, rank: int) -> RankDump:
    content = read_json(path / f"rank_{rank:04d}.json")
    tensors, _ = read_tensors(path / f"rank_{rank:04d}.safetensors")
    batches = [
        Batch(
            tokens=tensors[f"tokens.{number}"],
            targets=tensors[f"targets.{number}"],
            document_ids=tensors.get(f"document_ids.{number}"),
            sample_ids=ids,
        )
        for number, ids in enumerate(content["sample_ids"])
    ]
    return RankDump(batches=batches, random_state=content["random_state"])
