"""Where weight gradients go, how they add up, and the machinery around them: checkpointing and compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8train.backends import get_backend
from fp8train.backends.coverage import COUNTS, GEMMS
from fp8train.nn.linear import Float8Linear
from fp8train.nn.linear_function import InplaceGrad
from fp8train.nn.weights import converted_linears, install_weight_hooks
from fp8train.quant.formats import BF16, BLOCKWISE, LinearPrecision
from tests.nn.precisions import PRECISIONS, made, normal, precisions, run
from tests.nn.test_fused import Part, inputs


def model_of(precision: LinearPrecision = BLOCKWISE, bias: bool = False) -> nn.Sequential:
    model = nn.Sequential(
        made(1, 140, 130, precision, bias=bias), nn.ReLU(), made(1, 20, 140, precision, seed=1, bias=bias)
    )
    install_weight_hooks(model)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["blockwise", "fp32-scales", "requant", "bf16"])
def test_64_micro_batches_give_the_gradient_of_one_batch(name: str) -> None:
    # blocks of 128 tokens coincide when every micro-batch is a multiple of 128
    linear = made(1, 24, 32, PRECISIONS[name], bias=False)
    x, dy = normal(64 * 128, 32), normal(64 * 128, 24, seed=1)
    whole = run(linear, x, dy).dw
    for part, part_dy in zip(x.split(128), dy.split(128), strict=True):
        linear(part).backward(part_dy)
    difference = (linear.weight.grad - whole).norm() / whole.norm()
    assert float(difference) < 1e-5  # in BF16 it would be about 2^-9 * sqrt(64) / sqrt(3) = 1e-2


@precisions
@pytest.mark.parametrize("sink", ["return", "inplace"])
def test_256_and_1_make_257_in_the_gradient(precision: LinearPrecision, sink: str) -> None:
    # in BF16 257 is 256; the tokens that carry 448 meet a zero, and make every block's scale a power of two
    linear = made(1, 1, 1, precision, bias=False)
    if sink == "inplace":
        linear.grad_sink = InplaceGrad(torch.zeros(1, 1))
    dy = torch.tensor([[0.0], [448.0], [1.0]], dtype=torch.bfloat16)
    for value in (256.0, 1.0):
        linear(torch.tensor([[448.0], [0.0], [value]], dtype=torch.bfloat16)).backward(dy)
    grad = linear.weight.grad if linear.grad_sink is None else linear.grad_sink.buffer
    assert grad.dtype is torch.float32 and grad.item() == 257.0


@pytest.mark.parametrize("name", ["blockwise", "fp32-scales", "requant", "bf16", "fp32", "wgrad-only"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_inplace_sink_equals_the_returned_gradient(name: str, backend: str) -> None:
    x, dy = normal(150, 130), normal(150, 40, seed=1)
    linear = made(1, 40, 130, PRECISIONS[name], backend=backend)
    returned = run(linear, x, dy)
    notified = []
    linear.grad_sink = InplaceGrad(torch.zeros(40, 130), notify=lambda: notified.append(len(notified)))
    sunk = run(linear, x, dy)
    assert sunk.dw is None and torch.equal(linear.grad_sink.buffer, returned.dw) and notified == [0]
    assert torch.equal(sunk.dx, returned.dx) and torch.equal(sunk.db, returned.db)
    run(linear, x, dy)
    assert torch.equal(linear.grad_sink.buffer, returned.dw + returned.dw) and notified == [0, 1]


def test_inplace_sink_gets_nothing_from_a_frozen_weight_or_an_empty_batch() -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    notified = []
    linear.grad_sink = InplaceGrad(torch.zeros(40, 130), notify=lambda: notified.append(1))
    run(linear, normal(0, 130), normal(0, 40))
    assert notified == [1] and not linear.grad_sink.buffer.any()  # a reduction that waits for it can start
    linear.weight.requires_grad_(False)
    run(linear, normal(5, 130), normal(5, 40))
    assert notified == [1]


@pytest.mark.parametrize("sink", ["return", "inplace"])
def test_tied_weight_gets_the_sum_of_both_gradients(sink: str) -> None:
    first, second = made(1, 130, 130, BLOCKWISE, bias=False), made(1, 130, 130, BLOCKWISE, bias=False)
    second.weight = first.weight
    x, dy = normal(150, 130), normal(150, 130, seed=1)
    separate = made(1, 130, 130, BLOCKWISE, bias=False)
    hidden = first(x).detach()
    parts = [run(separate, x, dy), run(separate, hidden, dy)]
    if sink == "inplace":
        first.grad_sink = second.grad_sink = InplaceGrad(torch.zeros(130, 130))
    first(x).backward(dy)
    second(hidden).backward(dy)
    grad = first.weight.grad if sink == "return" else first.grad_sink.buffer
    assert torch.equal(grad, parts[0].dw + parts[1].dw)


def test_tied_weights_both_follow_an_optimizer_step() -> None:
    first, second = made(1, 130, 130, BLOCKWISE, bias=False), made(1, 130, 130, BLOCKWISE, bias=False)
    second.weight = first.weight
    optimizer = torch.optim.AdamW([first.weight], lr=0.1, fused=True)
    second(first(normal(5, 130))).sum().backward()
    optimizer.step()
    x = normal(5, 130)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), Float8Linear.from_linear(first, BLOCKWISE, "cpu")(x))


@pytest.mark.parametrize("name", ["blockwise", "requant", "bf16"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_changes_no_bit(name: str, reentrant: bool) -> None:
    model = model_of(PRECISIONS[name], bias=True)
    results = []
    for use in (False, True):
        x = normal(6, 130).requires_grad_(True)
        y = checkpoint(model, x, use_reentrant=reentrant) if use else model(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *gradients(model)])
        model.zero_grad()
    assert len(results[0]) == 6
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_what_checkpointing_repeats_is_not_counted_again(reentrant: bool, compiled: bool) -> None:
    model = model_of()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    COUNTS.reset()
    checkpoint(forward, normal(6, 130).requires_grad_(True), use_reentrant=reentrant).sum().backward()
    counts = COUNTS.snapshot()[model[0].site]
    assert {gemm: (count.fp8_calls, count.fp8_rows) for gemm, count in counts.items()} == dict.fromkeys(GEMMS, (1, 6))


def train_step(model: nn.Module, forward: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_(True)
    y = forward(x)
    y.square().sum().backward()
    results = [y.detach().clone(), x.grad, *gradients(model)]
    model.zero_grad()
    return results


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("blockwise", torch.float32),
        ("blockwise", torch.bfloat16),
        ("requant", torch.bfloat16),
        ("weight-only", torch.bfloat16),
        ("bf16", torch.bfloat16),
    ],
    ids=str,
)
def test_compiled_model_equals_the_eager_one(name: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = model_of(PRECISIONS[name]).to("cpu")  # moved: its operands must be there before the first compiled forward
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    x = normal(6, 130, dtype=dtype)
    for one, other in zip(train_step(model, compiled, x), train_step(model, model, x), strict=True):
        assert torch.equal(one, other)


def test_compiled_model_follows_steps_loads_and_announced_edits_without_recompiling() -> None:
    torch.compiler.reset()
    model = model_of()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x = normal(6, 130)
    for _ in range(3):
        compiled(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(compiled(x), model(x))
    model.load_state_dict({name: -2 * value for name, value in model.state_dict().items()})
    assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1


def test_compiled_model_takes_any_number_of_tokens() -> None:
    torch.compiler.reset()
    model = model_of()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (6, 130, 1, 0):
        x = normal(rows, 130)
        for one, other in zip(train_step(model, compiled, x), train_step(model, model, x), strict=True):
            assert torch.equal(one, other), rows


def test_compiled_readers_of_one_input_quantise_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    linears = nn.ModuleList([made(1, 40, 130, BLOCKWISE, seed=seed, bias=False) for seed in range(3)])
    compiled = torch.compile(
        lambda x: sum(linear(x).square().sum() for linear in linears), backend="aot_eager", fullgraph=True
    )
    x = normal(6, 130).requires_grad_(True)
    compiled(x)  # compiles
    backend, shapes = get_backend("cpu"), []
    kept = backend.quantize_dual
    monkeypatch.setattr(backend, "quantize_dual", lambda x, *specs: shapes.append(tuple(x.shape)) or kept(x, *specs))
    compiled(x)
    assert shapes == [(6, 130)]


def test_compiled_model_counts_what_it_runs() -> None:
    torch.compiler.reset()
    model = model_of()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train_step(model, compiled, normal(6, 130))
    COUNTS.reset()
    train_step(model, compiled, normal(6, 130))
    for linear in converted_linears(model):
        assert {name: count.fp8_calls for name, count in COUNTS.snapshot()[linear.site].items()} == {
            "fprop": 1,
            "dgrad": 1,
            "wgrad": 1,
        }


def test_compiled_model_trains_into_an_inplace_sink() -> None:
    torch.compiler.reset()
    model = model_of()
    x = normal(6, 130)
    expected = train_step(model, model, x)[2:]
    for linear in converted_linears(model):
        linear.grad_sink = InplaceGrad(torch.zeros_like(linear.weight))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    for linear, grad in zip(converted_linears(model), expected, strict=True):
        assert torch.equal(linear.grad_sink.buffer, grad)


@pytest.mark.slow
def test_model_compiled_by_inductor_equals_the_eager_one() -> None:
    # the GEMMs and quantisers are opaque operators and ReLU is exact; the square's gradient is one multiplication
    torch.compiler.reset()
    model = model_of()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    x = normal(6, 130)
    for one, other in zip(train_step(model, compiled, x), train_step(model, model, x), strict=True):
        assert torch.equal(one, other)


def test_second_derivative_is_refused_rather_than_wrong() -> None:
    linear = made(1, 40, 130, BLOCKWISE)
    x = normal(5, 130).requires_grad_(True)
    with pytest.raises(RuntimeError, match="create_graph=True; needs False"):
        torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    x, dy = inputs()
    with pytest.raises(RuntimeError, match="create_graph=True; needs False"):
        Part().fuse()(x.requires_grad_()).backward(dy, create_graph=True)


@pytest.mark.parametrize("rows", [128, 200])
def test_gradient_that_leaves_a_micro_batch_ragged_is_still_close(rows: int) -> None:
    # blocks do not coincide: two roundings that differ, each at 28 dB or better, are within 25 dB of another
    linear = made(1, 24, 32, BLOCKWISE, bias=False)
    x, dy = normal(600, 32), normal(600, 24, seed=1)
    whole = run(linear, x, dy).dw
    for part, part_dy in zip(x.split(rows), dy.split(rows), strict=True):
        linear(part).backward(part_dy)
    assert float((linear.weight.grad - whole).norm() / whole.norm()) < 10 ** (-25 / 20)


def test_bf16_linear_keeps_an_fp32_gradient_and_master() -> None:
    linear = made(1, 24, 32, replace(BF16, name="baseline"))
    result = run(linear, normal(5, 32, dtype=torch.bfloat16), normal(5, 24, dtype=torch.bfloat16))
    assert result.dw.dtype is torch.float32 and not torch.equal(result.dw, result.dw.to(torch.bfloat16).float())
    assert linear.weight.dtype is torch.float32 and linear.w_high.dtype is torch.bfloat16
