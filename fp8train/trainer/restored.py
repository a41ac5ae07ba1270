"""From a checkpoint to a model: its weights, in the precisions that its run had there."""

from __future__ import annotations

import dataclasses

import torch

from fp8train.checkpoint import Checkpoint
from fp8train.config import RunConfig
from fp8train.convert import convert_model
from fp8train.models import build_model
from fp8train.nn.weights import named_linears
from fp8train.quant.formats import LinearPrecision
from fp8train.recipe import Recipe
from fp8train.trainer.assembly import Assembly, assemble, resolve_activations
from fp8train.trainer.precision_control import follow_run


def restored(
    checkpoint: Checkpoint, device: torch.device, *, config: RunConfig | None = None, recipe: Recipe | None = None
) -> Assembly:
    """The model of a checkpoint as its run computed there: by its recipe, schedule and demotions.

    Args:
        config: the run's, with what was asked to be otherwise, such as the backend; its recipe is not read. None takes
            the run's, not compiled.
        recipe: another one, asked for by name: its rules hold, neither schedule nor demotions are followed.

    Raises:
        UserError: the weights do not fit the configuration, or recipe or backend do not serve here.
    """
    config = _uncompiled(checkpoint) if config is None else config
    if recipe is not None:
        return _filled(checkpoint, assemble(config, device, recipe=recipe, first_weights=False), None)
    return _filled(checkpoint, assemble(config, device, recipe=checkpoint.recipe, first_weights=False), checkpoint)


def precisions(checkpoint: Checkpoint, recipe: Recipe | None = None) -> dict[str, LinearPrecision]:
    """What every linear computed with at a checkpoint, by module path, or would by the rules of another recipe."""
    chosen = checkpoint.recipe if recipe is None else recipe
    model = build_model(resolve_activations(checkpoint.config.model, chosen), device="meta")
    convert_model(model, chosen, backend="reference", device_type="cpu", fused="never")
    if recipe is None:
        follow_run(model, chosen, checkpoint)
    return {fqn: linear.precision for fqn, linear in named_linears(model).items()}


def crossed(weights: Checkpoint, arithmetic: Checkpoint, device: torch.device) -> Assembly:
    """The model of one checkpoint as the run of another computed there: recipe, backend, schedule and demotions.

    Raises:
        UserError: the weights do not fit the configuration, or recipe or backend do not serve here.
    """
    own, other = _uncompiled(weights), arithmetic.config
    model = dataclasses.replace(own.model, activations=other.model.activations)
    config = dataclasses.replace(own, model=model, backend=other.backend, fused=other.fused)
    return _filled(weights, assemble(config, device, recipe=arithmetic.recipe, first_weights=False), arithmetic)


def _filled(weights: Checkpoint, assembly: Assembly, run: Checkpoint | None) -> Assembly:
    """With the weights of one checkpoint and, unless None, the precisions that a run had at another."""
    weights.restore(assembly.model)
    if run is not None:
        follow_run(assembly.model, assembly.recipe, run)
    return assembly


def _uncompiled(checkpoint: Checkpoint) -> RunConfig:
    """Its configuration; evaluation runs eagerly whatever it says."""
    return dataclasses.replace(checkpoint.config, compile=False)
