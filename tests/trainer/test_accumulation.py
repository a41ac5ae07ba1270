"""wgrad adds into the gradients from the second micro-batch of a step on, and nobody can tell from the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.benchmarks.step import training_step
from fp8train.data import Batcher, build_dataset
from fp8train.distributed import World
from fp8train.nn import linear_function
from fp8train.nn.linear import Float8Linear
from fp8train.nn.linear_function import InplaceGrad
from fp8train.nn.remedies import InputRemedy
from fp8train.nn.weights import converted_linears
from fp8train.optim import build_optimizer
from fp8train.trainer import step as step_module
from fp8train.trainer.accumulation import accumulate_in_place, accumulating_linears
from fp8train.trainer.assembly import Assembly, assemble
from fp8train.trainer.strict_coverage import StepAudit
from tests.tiny_run import tiny_config

CPU = torch.device("cpu")


def assembled(folder: Path, *overrides: str) -> Assembly:
    return assemble(tiny_config(folder, "micro_batch_samples=1", *overrides), CPU)


def weights_after(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, steps: int = 2) -> list[Tensor]:
    """Parameters of the tiny model after some steps of several micro-batches."""
    built: list[Assembly] = []
    monkeypatch.setattr(
        "fp8train.benchmarks.step.assemble", lambda *arguments: built.append(assemble(*arguments)) or built[0]
    )
    step, _ = training_step(tiny_config(folder, "micro_batch_samples=1", *overrides), World())
    for _ in range(steps):
        assert step().updated
    return [parameter.detach().clone() for parameter in built[0].model.parameters()]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of the GEMM that adds to a gradient, as a list with one number."""
    calls, add = [0], linear_function.gemm_add_

    def adding(*arguments: object, **options: object) -> None:
        calls[0] += 1
        add(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_function, "gemm_add_", adding)
    return calls


def test_weights_are_those_of_autograds_sums_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    ours = weights_after(tmp_path, monkeypatch)
    linears = len(accumulating_linears(assembled(tmp_path).model))
    micro_batches = tiny_config(tmp_path, "micro_batch_samples=1").global_batch_samples
    assert linears > 0 and micro_batches > 2 and calls == [2 * linears * (micro_batches - 1)]
    monkeypatch.setattr(step_module, "accumulating_linears", lambda model: [])
    theirs = weights_after(tmp_path, monkeypatch)
    assert calls == [2 * linears * (micro_batches - 1)]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_single_micro_batch_is_autograds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    samples = tiny_config(tmp_path).global_batch_samples
    weights_after(tmp_path, monkeypatch, f"micro_batch_samples={samples}")
    assert calls == [0]


def test_a_compiled_model_has_two_graphs_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fp8train.trainer.assembly._compile", lambda model, by_layer: model.compile(backend="aot_eager")
    )
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    ours = weights_after(tmp_path, monkeypatch, "compile=true", steps=3)
    assert graphs["unique_graphs"] == 2, "one for the first micro-batch, one for those after it"
    torch.compiler.reset()
    monkeypatch.setattr(step_module, "accumulating_linears", lambda model: [])
    theirs = weights_after(tmp_path, monkeypatch, "compile=true", steps=3)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def one_step(assembly: Assembly, folder: Path, world: World) -> int:
    """Train a step of micro-batches of one sample; their number."""
    config = tiny_config(folder, "micro_batch_samples=1")
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    batches = Batcher(dataset, config.global_batch_samples, 1, 0, 1).micro_batches(0)
    optimizer = build_optimizer(assembly.model, config.optim, assembly.recipe.moments)
    assert step_module.train_step(assembly.model, optimizer, batches, world, clip=None).updated
    return len(batches)


class TwoRanks(World):
    """As one rank of two, of which the other does the same."""

    def all_reduce_sum(self, value: Any) -> Any:
        """Of one rank, as it is."""
        return value


def test_ddp_accumulates_the_last_micro_batch_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, assembly = counted(monkeypatch), assembled(tmp_path)
    micro_batches = one_step(assembly, tmp_path, TwoRanks(world_size=2))
    assert calls == [len(accumulating_linears(assembly.model)) * (micro_batches - 2)]


EXCLUDED: dict[str, Callable[[Float8Linear], object]] = {
    "a hook on the gradient": lambda linear: linear.weight.register_hook(lambda grad: grad),
    "a hook after its accumulation": lambda linear: linear.weight.register_post_accumulate_grad_hook(lambda p: None),
    "frozen": lambda linear: linear.weight.requires_grad_(False),
    "a remedy": lambda linear: linear.set_remedy(InputRemedy(clamp=1.0)),
    "columns contiguous": lambda linear: setattr(
        linear, "weight", torch.nn.Parameter(linear.weight.detach().t().contiguous().t())
    ),
    "a sink": lambda linear: setattr(linear, "grad_sink", InplaceGrad(torch.zeros(1))),
}


@pytest.mark.parametrize("why", EXCLUDED)
def test_what_autograd_must_see_is_left_to_it(why: str, tmp_path: Path) -> None:
    model = assembled(tmp_path).model
    before = accumulating_linears(model)
    EXCLUDED[why](before[0])
    assert accumulating_linears(model) == before[1:]


def test_an_audited_step_accumulates_as_the_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, assembly = counted(monkeypatch), assembled(tmp_path)
    audit = StepAudit(assembly, compiled=False)
    audit.begin()
    micro_batches = one_step(assembly, tmp_path, World())
    problems, _ = audit.end()
    assert problems == [] and calls == [len(accumulating_linears(assembly.model)) * (micro_batches - 1)]


def test_bf16_and_shared_weights_are_left_to_autograd(tmp_path: Path) -> None:
    assert accumulating_linears(assembled(tmp_path, "recipe=bf16").model) == []
    model = assembled(tmp_path).model
    first, second, *others = accumulating_linears(model)
    second.weight = first.weight
    assert accumulating_linears(model) == others


def test_sinks_are_gone_after_an_error_and_no_gradient_means_no_sink(tmp_path: Path) -> None:
    model = assembled(tmp_path).model
    first, second = accumulating_linears(model)[:2]
    first.weight.grad = torch.zeros_like(first.weight)
    with pytest.raises(RuntimeError), accumulate_in_place([first, second]):
        assert first.grad_sink is not None and first.grad_sink.buffer is first.weight.grad
        assert second.grad_sink is None
        raise RuntimeError
    assert all(linear.grad_sink is None for linear in converted_linears(model))
