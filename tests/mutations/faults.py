"""Faults put into our code, by a monkeypatch, in place of what is right there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8train.backends.cpu import CpuBackend
from fp8train.backends.hopper import HopperBackend
from fp8train.checkpoint import Checkpoint
from fp8train.data import Batcher
from fp8train.models import decoder
from fp8train.nn import inputs, linear, linear_function, weights
from fp8train.nn.linear import Float8Linear
from fp8train.nn.operands import Operand
from fp8train.quant import reference
from fp8train.quant.formats import BF16, E4M3, QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.recipe import load_recipe
from fp8train.trainer import assembly, evaluation, step
from tests.mutations import quantisers

Inject = Callable[[pytest.MonkeyPatch], None]


class Forgetful(dict):
    """A registry that remembers nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        return


def stale_after_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weights, "_LIVE", Forgetful())


def stale_after_load(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linear, "_after_load", lambda module, keys: None)


def stale_after_edit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Float8Linear, "refresh_if_stale", lambda self: None)


def input_by_address(patch: pytest.MonkeyPatch) -> None:
    held: dict[Any, Any] = {}

    def get(self: inputs.InputCache, x: Tensor, needs: inputs.InputNeeds, backend: str, reader: int) -> Any:
        key = (x.data_ptr(), needs, backend)
        if key not in held:
            held.clear()
            held[key] = inputs.quantize_input(inputs.as_matrix(x.detach()), needs, backend)
        return held[key]

    patch.setattr(inputs.InputCache, "get", get)


def gemm_without_bias(patch: pytest.MonkeyPatch) -> None:
    gemm = linear_function.gemm
    patch.setattr(linear_function, "gemm", lambda *args, **options: gemm(*args, **options | {"bias": None}))


def bf16_weight_gradient(patch: pytest.MonkeyPatch) -> None:
    weight_grad = linear_function.weight_grad
    patch.setattr(linear_function, "weight_grad", lambda *args: weight_grad(*args).bfloat16().float())


def bf16_accumulation(patch: pytest.MonkeyPatch) -> None:
    setup = Float8Linear._setup

    def rounding(self: Float8Linear, *args: Any) -> None:
        setup(self, *args)
        if not self.weight.is_meta:
            self.weight.register_post_accumulate_grad_hook(lambda p: p.grad.copy_(p.grad.bfloat16()))

    patch.setattr(Float8Linear, "_setup", rounding)


def square_blocks_on_dy(patch: pytest.MonkeyPatch) -> None:
    quantized_grad = linear_function.quantized_grad

    def rounded(dy: Tensor, *args: Any) -> Any:
        square = reference.quantize(dy, QuantSpec(E4M3, (128, 128)))
        return quantized_grad(reference.dequantize(square, dy.dtype), *args)

    patch.setattr(linear_function, "quantized_grad", rounded)


def wgrad_of_rounded_input(patch: pytest.MonkeyPatch) -> None:
    quantize_input = inputs.quantize_input

    def twice(x: Tensor, needs: inputs.InputNeeds, backend: str) -> Any:
        row, col = quantize_input(x, needs, backend)
        if col is None or needs.row is None or needs.requant:
            return row, col
        tensor = reference.dequantize(reference.quantize(x, QuantSpec(E4M3, "row", "fp32")), x.dtype)
        return row, quantize_input(tensor, needs, backend)[1]

    patch.setattr(inputs, "quantize_input", twice)


def gradient_doubled_by_recompute(patch: pytest.MonkeyPatch) -> None:
    run_layer = decoder.run_layer

    def doubled(choice: str, layer: nn.Module, *args: Any) -> Tensor:
        y = run_layer(choice, layer, *args)
        if choice == "none" or not torch.is_grad_enabled():
            return y
        again = layer(*args)
        return y + (again - again.detach())

    patch.setattr(decoder, "run_layer", doubled)


def recompute_counted_twice(patch: pytest.MonkeyPatch) -> None:
    run_layer, weight_grad = decoder.run_layer, linear_function.weight_grad
    recomputes = []

    def noting(choice: str, layer: nn.Module, *args: Any) -> Tensor:
        recomputes[:] = [choice] if choice != "none" else []
        return run_layer(choice, layer, *args)

    def twice(*args: Any) -> Any:
        if recomputes:
            weight_grad(*args)
        return weight_grad(*args)

    patch.setattr(decoder, "run_layer", noting)
    patch.setattr(linear_function, "weight_grad", twice)


def eval_in_bf16(patch: pytest.MonkeyPatch) -> None:
    score = evaluation.EvalSet.score

    def in_bf16(self: evaluation.EvalSet, model: nn.Module) -> evaluation.Score:
        with weights.evaluation_precision(model, BF16):
            return score(self, model)

    patch.setattr(evaluation.EvalSet, "score", in_bf16)


def eval_leaves_bf16_behind(patch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def forever(model: nn.Module, precision: Any) -> Iterator[None]:
        for module in weights.converted_linears(model):
            module.set_precision(precision)
        yield

    patch.setattr(evaluation, "evaluation_precision", forever)


def bias_in_eval_only(patch: pytest.MonkeyPatch) -> None:
    forward = Float8Linear.forward
    patch.setattr(Float8Linear, "forward", lambda self, x: forward(self, x) + 0.5 * (not self.training))


def lost_micro_batches(patch: pytest.MonkeyPatch) -> None:
    sync = step.gradient_sync

    @contextlib.contextmanager
    def forgetting(model: nn.Module, last: bool) -> Iterator[None]:
        model.zero_grad()  # as a buffer that each micro-batch writes instead of adding to
        with sync(model, last):
            yield

    patch.setattr(step, "gradient_sync", forgetting)


def same_data_on_all_ranks(patch: pytest.MonkeyPatch) -> None:
    micro_batches = Batcher.micro_batches

    def of_rank_0(self: Batcher, number: int) -> Any:
        return micro_batches(
            Batcher(self.dataset, self.global_batch_samples, self.micro_batch_samples, 0, self.world_size), number
        )

    patch.setattr(Batcher, "micro_batches", of_rank_0)


def moments_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Checkpoint, "_restore_optimizer", lambda self, model, optimizer: None)


def pattern_with_a_hole(patch: pytest.MonkeyPatch) -> None:
    document = dict(load_recipe("blockwise").document)
    document["rules"] = [
        {"match": r"re:.*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)", "use": "fp8"},
        {"match": "*", "use": "bf16"},
    ]
    patch.setattr(assembly, "load_recipe", lambda source: load_recipe(document))


def emulation_without_recipe(patch: pytest.MonkeyPatch) -> None:
    convert = assembly.convert_model

    def converted(model: nn.Module, *args: Any, **options: Any) -> Any:
        report = convert(model, *args, **options)
        for module in weights.converted_linears(model):
            module.set_precision(BF16)
        return report

    patch.setattr(assembly, "convert_model", converted)


def unwritten_output(patch: pytest.MonkeyPatch) -> None:
    scaled_mm = CpuBackend.scaled_mm

    def partly(self: CpuBackend, *args: Any) -> Tensor:
        y = scaled_mm(self, *args)
        y[128:] = y[:1]  # the last, short tile keeps what the memory held before
        return y

    patch.setattr(CpuBackend, "scaled_mm", partly)


class Plain(nn.Linear):
    """What a wrapper of another library leaves where a converted linear was."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def replaced_after_conversion(patch: pytest.MonkeyPatch) -> None:
    convert = assembly.convert_model

    def converted(model: nn.Module, *args: Any, **options: Any) -> Any:
        report = convert(model, *args, **options)
        old = model.layers[0].mlp.down_proj
        plain = Plain(old.in_features, old.out_features, bias=False)
        plain.weight = old.weight
        model.layers[0].mlp.down_proj = plain
        return report

    patch.setattr(assembly, "convert_model", converted)


def first_micro_batch_only(patch: pytest.MonkeyPatch) -> None:
    gemm, calls = linear_function.gemm, []

    def tiring(left: Operand, right: Operand, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 30 and left.spec is not None and right.spec is not None:
            left, right = (Operand(decoded(q)) for q in (left, right))
        return gemm(left, right, **options)

    patch.setattr(linear_function, "gemm", tiring)


def decoded(operand: Operand) -> Tensor:
    assert operand.scale_inv is not None and operand.spec is not None
    return reference.dequantize(QTensor(operand.data, operand.scale_inv, operand.spec), torch.bfloat16)


def no_promotion(patch: pytest.MonkeyPatch) -> None:
    hopper = HopperBackend(14, None)

    def unpromoted(self: CpuBackend, a: Any, b: Any, *rest: Any) -> Tensor:
        one = torch.ones(a.shape[0], 1), torch.ones(b.shape[0], 1)
        row = QuantSpec(E4M3, "row")
        # the test's scales are one number for all blocks of K but for a factor of 2: as if there were one
        mean = a.scale_inv.mean() * b.scale_inv.mean()
        tensors = [QTensor(q.qdata, scale, row) for q, scale in zip((a, b), one, strict=True)]
        return hopper.scaled_mm(*tensors, *rest) * mean

    patch.setattr(CpuBackend, "scaled_mm", unpromoted)


def faulty(quantise: quantisers.Quantiser) -> Inject:
    return lambda patch: quantisers.install(patch, quantise)


def scales(rule: quantisers.ScaleRule) -> Inject:
    return faulty(quantisers.with_scales(rule))
