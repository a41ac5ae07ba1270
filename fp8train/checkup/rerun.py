"""One step again, as a black box describes it, in another precision."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.checkpoint import Checkpoint, checkpoint_path, open_checkpoint, saved_steps
from fp8train.checkpoint.files import read_tensors
from fp8train.checkpoint.random_state import restore_random_state
from fp8train.config import RunConfig, config_from_dict
from fp8train.data import MASKED_TARGET, Batch, Batcher, Dataset, build_dataset
from fp8train.distributed import World
from fp8train.errors import CheckpointError, ConfigError
from fp8train.nn.weights import named_linears, weights_changed
from fp8train.optim import build_optimizer, learning_rate, set_learning_rate
from fp8train.quant.formats import BF16, FP32, LinearPrecision
from fp8train.recipe import Recipe, load_recipe
from fp8train.trainer.assembly import Assembly, assemble
from fp8train.trainer.blackbox import WEIGHTS_FILE, read_dump
from fp8train.trainer.precision_control import PrecisionControl, demoted_linears
from fp8train.trainer.step import inputs, train_step

OWN, HIGH = "own", {"bf16": BF16, "fp32": FP32}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a step gave: loss, gradient norm, and the first linear whose output was not finite."""

    loss: float
    grad_norm: float
    first_nonfinite: str | None = None

    def bad(self, limit: float | None) -> bool:
        """Not finite, or above the limit of a spike."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm)) or (
            limit is not None and self.loss > limit
        )


class Rerun:
    """The step of a black box, ready to be run in any precision.

    Args:
        path: its folder, run_dir/blackbox/step_N.
        world: one process.
        backend: None takes the run's.

    Attributes:
        weights_from: where the weights of the step come from, in words.
    """

    def __init__(self, path: Path, world: World, backend: str | None = None) -> None:
        self.path, self.world = path, world
        self.dump, self.ranks = read_dump(path)
        config = config_from_dict(self.dump.config, who=str(path))
        self.config: RunConfig = dataclasses.replace(config, compile=False, backend=backend or config.backend)
        self.recipe: Recipe = load_recipe(self.dump.recipe_document)
        self.batches = [batch for rank in self.ranks for batch in rank.batches]
        self.weights_from, self._weights = self._find_weights()

    @property
    def limit(self) -> float | None:
        """Loss above which the step is a spike; None for one that was not finite."""
        return self.dump.limit if self.dump.kind == "spike" else None

    def nonfinite_weights(self) -> list[str]:
        """Parameters that are not finite."""
        return [name for name, weight in self._weights.items() if not bool(weight.isfinite().all())]

    def measure(self, precision: str, batches: Sequence[Batch] | None = None) -> Measured:
        """Forward and backward of the step; precision is "own", "bf16" or "fp32" (activations in FP32 too)."""
        assembly = self.model(precision)
        restore_random_state(self.ranks[0].random_state)
        found: list[str] = []
        hooks = [
            linear.register_forward_hook(functools.partial(_note_nonfinite, fqn, found))
            for fqn, linear in named_linears(assembly.model).items()
        ]
        optimizer = torch.optim.SGD(assembly.model.parameters(), lr=0.0)  # loss and norm are those before its step
        result = train_step(
            assembly.model, optimizer, self.batches if batches is None else batches, self.world, clip=None
        )
        for hook in hooks:
            hook.remove()
        return Measured(loss=result.loss, grad_norm=result.grad_norm, first_nonfinite=found[0] if found else None)

    def sequence_losses(self) -> dict[int, float]:
        """Mean loss of every sequence of the step, in FP32."""
        assembly = self.model("fp32")
        losses: dict[int, float] = {}
        with torch.no_grad():
            for batch in self.batches:
                tokens, targets, ids = inputs(batch, self.world.device)
                for row, identity in enumerate(batch.sample_ids):
                    one = slice(row, row + 1)
                    valid = max(int((targets[one] != MASKED_TARGET).sum()), 1)
                    loss = assembly.model(tokens[one], targets[one], None if ids is None else ids[one])
                    losses[identity] = float(loss) / valid
        return losses

    def losses_without(self) -> dict[str, float]:
        """Loss of the step with one FP8 linear at a time in BF16."""
        assembly = self.model(OWN)
        valid = sum(int((batch.targets != MASKED_TARGET).sum()) for batch in self.batches)
        found = {}
        for name, linear in named_linears(assembly.model).items():
            own = linear.precision
            if own.any_fp8:
                linear.set_precision(BF16)
                with torch.no_grad():
                    total = sum(float(assembly.model(*inputs(b, self.world.device))) for b in self.batches)
                found[name] = total / max(valid, 1)
                linear.set_precision(own)
        return found

    def model(self, precision: str) -> Assembly:
        """The model with the step's weights, in a precision."""
        config = self.config
        if precision == "fp32":
            model = dataclasses.replace(config.model, activations="float32", attention="float32")
            config = dataclasses.replace(config, model=model)
        assembly = assemble(config, self.world.device, recipe=self.recipe, first_weights=False)
        with torch.no_grad():
            for name, parameter in assembly.model.named_parameters():
                parameter.copy_(self._weights[name])
        for fqn, linear in named_linears(assembly.model).items():
            changed = self.dump.precisions.get(fqn)
            if precision != OWN:
                linear.set_precision(HIGH[precision])
            elif changed is not None:
                linear.set_precision(self._named(changed))
        weights_changed(assembly.model)
        return assembly

    @functools.cached_property
    def _dataset(self) -> Dataset:
        return build_dataset(self.config.data, self.config.seq_len, self.config.seed)

    def step_batches(self, step: int) -> list[Batch]:
        """Micro-batches of all ranks of a step (counted from 0), read again.

        Raises:
            UserError: the data is not there any more.
        """
        ranks = self.dump.world_size
        # in the order of the samples, since a stream would start again to go back
        batches = Batcher(
            self._dataset, self.config.global_batch_samples, self.config.micro_batch(ranks)
        ).micro_batches(step)
        return [batch for rank in range(ranks) for batch in batches[rank::ranks]]

    def _named(self, name: str) -> LinearPrecision:
        if name not in self.recipe.precisions:
            raise CheckpointError(
                f"{self.path}: precision {name!r} is not in its recipe; needs an undamaged black box."
            )
        return self.recipe.precisions[name]

    def _find_weights(self) -> tuple[str, dict[str, Tensor]]:
        if self.dump.weights:
            tensors, _ = read_tensors(self.path / WEIGHTS_FILE)
            return f"{self.path.name}/{WEIGHTS_FILE}", tensors
        before = self.dump.step - 1
        checkpoint = nearest_checkpoint(self.path.parents[1], before)
        assembly = assemble(self.config, self.world.device, recipe=self.recipe, first_weights=checkpoint is None)
        optimizer = build_optimizer(assembly.model, self.config.optim, self.recipe.moments)
        control = PrecisionControl(assembly.model, self.recipe, self.config.steps)
        torch.manual_seed(self.config.seed)
        start, source = 0, f"the first weights of seed {self.config.seed}"
        if checkpoint is not None:
            checkpoint.restore(assembly.model, optimizer)
            start, source = checkpoint.step, str(checkpoint.path)
        # an alarm goes back to a checkpoint: what it had demoted at the step it had at every step since
        demoted = [name for name, kept in self.dump.precisions.items() if kept == BF16.name]
        scheduled = [name for name in demoted if control.precision(name, self.dump.step) == BF16]
        known = {} if checkpoint is None else demoted_linears(checkpoint)  # of those that the schedule hides
        control.demoted = dict.fromkeys((set(demoted) - set(scheduled)) | (known.keys() & scheduled), "an alarm")
        self._check_past(source, start, before)
        for step in range(start, before):
            control.apply(step + 1)
            set_learning_rate(optimizer, learning_rate(self.config.optim, step, self.config.steps))
            clip = self.config.optim.clip_grad_norm
            train_step(assembly.model, optimizer, self.step_batches(step), self.world, clip=clip)
        weights = {name: p.detach().cpu().clone() for name, p in assembly.model.named_parameters()}
        return f"{source}, {before - start} steps on", weights

    def _check_past(self, source: str, start: int, before: int) -> None:
        """Refuse weights that cannot be made again, since the steps were not trained as the black box's own was.

        Raises:
            CheckpointError: they had other settings.
        """
        wanted = "needs a checkpoint of later: lower checkpoint.every, or keep more of them (checkpoint.keep_last)."
        for file in sorted(self.path.parents[1].glob("*.until_step_[0-9]*.yaml")):
            last = int(file.stem.rpartition("_")[2])
            if start < last <= before:
                raise CheckpointError(
                    f"replay: steps {start + 1} to {last} were trained with other settings ({file.name}) than step "
                    f"{self.dump.step}, and would be again from {source}; {wanted}"
                )


def _note_nonfinite(name: str, found: list[str], linear: nn.Module, args: Any, output: Tensor) -> None:
    """Forward hook: the name of a linear whose output is not finite."""
    if not bool(output.isfinite().all()):
        found.append(name)


def nearest_checkpoint(run_dir: Path, step: int) -> Checkpoint | None:
    """The latest whole checkpoint of a run at or before a step; None if there is none."""
    for saved in sorted((saved for saved in saved_steps(run_dir) if saved <= step), reverse=True):
        with contextlib.suppress(CheckpointError):  # damaged: an earlier one serves as well, it only takes more steps
            return open_checkpoint(checkpoint_path(run_dir, saved))
    return None


def find_dump(path: Path) -> Path:
    """The black box that a path names: itself, or the newest of a run folder.

    Raises:
        ConfigError: there is none.
    """
    if (path / "dump.json").is_file():
        return path
    found = sorted(path.glob("blackbox/step_*/dump.json"), key=lambda file: (file.stat().st_mtime_ns, file))
    if not found:
        raise ConfigError(
            f"replay: {path} holds no black box; needs run_dir/blackbox/step_N or a run folder with one. A run writes "
            "it when a step is not finite or its loss leaps; see blackbox.keep."
        )
    return found[-1].parent
