"""What is examined: the user's model, recipe, data and optimizer, on a few sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp8train.backends import get_backend
from fp8train.backends.interface import Backend
from fp8train.config import RunConfig
from fp8train.data import Batch, Batcher, Dataset, build_dataset, check_model_tokenizer, check_vocabulary
from fp8train.distributed import World
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import converted_linears
from fp8train.optim import build_optimizer, learning_rate, set_learning_rate
from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.shards import whole
from fp8train.trainer.assembly import Assembly, assemble
from fp8train.trainer.step import StepResult, train_step

BLOCK = 128  # tokens that share a scale in wgrad
PARTS = 4  # micro-batches that a step is split into
MOST_SAMPLES = 4  # of a micro-batch


class KeepGradients(torch.optim.Optimizer):
    """Keeps the gradients that a step gives, by parameter name, and moves nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self.gradients: dict[str, Tensor] = {}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Copy the gradients."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.gradients[self._names[id(parameter)]] = whole(parameter.grad).clone()


class Subject:
    """A configuration, with its data read once; models are built from it as often as checks ask.

    A step is PARTS micro-batches of `size` sequences, whole blocks of 128 tokens where the sequence length allows.

    Args:
        config: of a run; run_dir is not used.
        device: where models are built.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        length = config.seq_len // BLOCK * BLOCK or config.seq_len
        holdout = config.data.holdout_fraction or 0.05
        data = dataclasses.replace(config.data, eval_windows=PARTS, holdout_fraction=holdout)
        self.config = dataclasses.replace(config, seq_len=length, data=data, compile=False)
        self.world = World(device=device)
        self.dataset: Dataset = build_dataset(data, length, config.seed)
        check_model_tokenizer(self.dataset.tokenizer, config.data, config.model.init_from)
        check_vocabulary(self.dataset, config.model.vocab_size, config.model.init_from)
        sizes = (n for n in range(1, MOST_SAMPLES + 1) if n * length % BLOCK == 0)
        self.size = next(sizes, 1)

    @property
    def device(self) -> torch.device:
        """Where models are built."""
        return self.world.device

    def fresh(self, **changes: Any) -> Assembly:
        """The model with its first weights; `changes` replace keys of the configuration."""
        torch.manual_seed(self.config.seed)
        return assemble(dataclasses.replace(self.config, **changes), self.device)

    def batcher(self, rank: int = 0, world_size: int = 1, size: int | None = None) -> Batcher:
        """Batches of the examined step for one rank, in micro-batches of `size` sequences; None: self.size."""
        return Batcher(self.dataset, self.size * PARTS, size or self.size, rank, world_size)

    def batches(self, size: int | None = None, step: int = 0) -> list[Batch]:
        """Micro-batches of a step."""
        return self.batcher(size=size).micro_batches(step)

    def gradients(self, assembly: Assembly, batches: Sequence[Batch]) -> tuple[StepResult, dict[str, Tensor]]:
        """One step as training takes it, with its gradients and without the update."""
        keep = KeepGradients(assembly.model)
        result = train_step(assembly.model, keep, batches, self.world, clip=None)
        return result, keep.gradients

    def optimizer(self, assembly: Assembly) -> torch.optim.Optimizer:
        """The optimizer of the run, at its peak learning rate: the first of a warm-up may be 0."""
        optimizer = build_optimizer(assembly.model, self.config.optim, assembly.recipe.moments)
        steps = range(min(self.config.steps, 1000))
        set_learning_rate(optimizer, max(learning_rate(self.config.optim, step, self.config.steps) for step in steps))
        return optimizer

    def train(self, assembly: Assembly, optimizer: torch.optim.Optimizer, step: int) -> StepResult:
        """One optimizer step."""
        clip = self.config.optim.clip_grad_norm
        return train_step(assembly.model, optimizer, self.batches(step=step), self.world, clip=clip)

    def backend(self, assembly: Assembly) -> Backend:
        """What executes the model's GEMMs."""
        return get_backend(assembly.report.backend)


def precisions(assembly: Assembly) -> list[LinearPrecision]:
    """The distinct precisions of a model."""
    return list(dict.fromkeys(row.numbers for row in assembly.report.rows if row.numbers is not None))


def specs(assembly: Assembly) -> list[QuantSpec]:
    """The distinct FP8 specifications of a model."""
    operands = (
        spec for p in precisions(assembly) for gemm in p.gemms.values() for spec in (gemm.left, gemm.right) if spec
    )
    return list(dict.fromkeys(operands))


def representatives(assembly: Assembly) -> list[tuple[str, Float8Linear]]:
    """For each precision that multiplies in FP8, the model's smallest linear of it, and a small one with a bias."""
    rows = {row.site: row for row in assembly.report.rows}
    linears = [linear for linear in converted_linears(assembly.model) if linear.site in rows]
    chosen: list[tuple[str, Float8Linear]] = []
    for precision in precisions(assembly):
        own = [linear for linear in linears if rows[linear.site].numbers == precision and linear.remedy is None]
        if precision.any_fp8:
            smallest = min(own, key=lambda linear: linear.weight.numel(), default=None)
            chosen += [(rows[smallest.site].fqn, smallest)] if smallest is not None else []
            chosen.append((f"a linear in {precision.name} with bias", _with_bias(precision, assembly)))
    return chosen


def _with_bias(precision: LinearPrecision, assembly: Assembly) -> Float8Linear:
    device = next(assembly.model.parameters()).device
    linear = Float8Linear(200, 136, True, precision=precision, backend=assembly.report.backend, device=device)
    with torch.no_grad():
        linear.weight.copy_(numbers(136, 200, 1).to(device) * 0.05)
        linear.bias.copy_(torch.linspace(-8, 8, 136))
    linear.refresh_weight()
    return linear


def numbers(rows: int, cols: int, seed: int, spread: int = 0) -> Tensor:
    """Normal numbers [rows, cols], each row of a magnitude of its own within 2^+-spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    if spread:
        x = x * torch.exp2(torch.randint(-spread, spread + 1, (rows, 1), generator=generator))
    return x
