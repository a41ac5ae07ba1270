"""The residual stream's sum with its norm: the bits of the plain module, one read forward and one write backward."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8train.models.norm import AddRMSNorm
from fp8train.nn.fused import plain_module
from fp8train.nn.fused_layouts import NORMS, full_name
from fp8train.nn.fused_norm import OPS, FusedAddRMSNorm, fused_norm
from fp8train.nn.inputs import InputCache, QuantizedInput
from fp8train.nn.linear import Float8Linear
from fp8train.quant.formats import BLOCKWISE
from tests.kernels.products import DEVICE
from tests.nn.precisions import assert_same, normal

K, TOKENS = 136, (2, 33)
BACKEND = "cpu" if DEVICE == "cpu" else "triton"
same_bits = pytest.mark.skipif(DEVICE != "cpu", reason="torch's norm on a GPU differs from ours in a last place")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
branches = pytest.mark.parametrize("branch", [torch.bfloat16, torch.float32, None], ids=["bf16", "fp32", "none"])
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


class Stream(nn.Module):
    """x + branch and its norm, read by a linear whose result goes back into the stream, as in a decoder layer."""

    def __init__(self, fuse: bool, backend: str = BACKEND) -> None:
        super().__init__()
        linear = nn.Linear(K, K, bias=False)
        self.norm = AddRMSNorm(K, 1e-5)
        with torch.no_grad():
            linear.weight.copy_(normal(K, K, seed=4) * K**-0.5)
            self.norm.weight.copy_(torch.linspace(0.5, 1.5, K))
        self.to(DEVICE)
        self.linear = Float8Linear.from_linear(linear.to(DEVICE), BLOCKWISE, backend)
        self.linear.inputs = InputCache()
        if fuse:
            self.norm = fused_norm(self.norm, [self.linear], (), NORMS[full_name(self.norm)])  # type: ignore[assignment]

    def forward(self, x: Tensor, branch: Tensor | None) -> Tensor:
        total, normed = self.norm(x, branch, torch.bfloat16)
        return total + self.linear(normed)


def inputs(dtype: torch.dtype, branch: torch.dtype | None) -> list[Tensor | None]:
    """x and branch with rows of different magnitude."""
    magnitude = 2.0 ** torch.arange(-4, TOKENS[1] - 4).remainder(9)[:, None]
    x, y = ((normal(*TOKENS, K, seed=seed) * magnitude).to(DEVICE) for seed in (1, 2))
    return [x.to(dtype).requires_grad_(), None if branch is None else y.to(branch).requires_grad_()]


def step(stream: Stream, tensors: list[Tensor | None], **more: bool) -> dict[str, Tensor]:
    """Result and gradients, by name."""
    out = checkpoint(stream, *tensors, use_reentrant=False) if more.get("recompute") else stream(*tensors)
    out.backward(normal(*TOKENS, K, seed=3).to(DEVICE, out.dtype))
    named = {"x": tensors[0], "branch": tensors[1]} | dict(stream.named_parameters())
    return {"out": out.detach()} | {name: tensor.grad for name, tensor in named.items() if tensor is not None}


def step_in_parts(stream: Stream, tensors: list[Tensor | None]) -> dict[str, Tensor]:
    """As step, by the plain module; what the norm gives to the stream is added up before it meets the stream's own.

    Autograd adds an FP32 stream's own gradient to the first of the two terms that F.rms_norm gives, and then the other.
    """
    x, branch = tensors
    total, _ = stream.norm(x, branch)
    through, normed = total.detach().requires_grad_(), total.detach().requires_grad_()
    out = through + stream.linear(stream.norm(normed, None, torch.bfloat16)[1])
    out.backward(normal(*TOKENS, K, seed=3).to(DEVICE, out.dtype))
    dx = normed.grad + through.grad
    found = {"out": out.detach(), "x": dx} | ({} if branch is None else {"branch": dx.to(branch.dtype)})
    return found | {name: parameter.grad for name, parameter in stream.named_parameters()}


@same_bits
@dtypes
@branches
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bits_are_those_of_the_plain_module(dtype: torch.dtype, branch: torch.dtype | None, backend: str) -> None:
    fused = Stream(True, backend)
    made = step(fused, inputs(dtype, branch))
    assert_same(step_in_parts(Stream(False, backend), inputs(dtype, branch)), made)
    if dtype is torch.bfloat16:  # where x.float() adds up what the norm gives
        assert_same(step(Stream(False, backend), inputs(dtype, branch)), made)
    total, normed = fused.norm(*inputs(dtype, branch))
    assert isinstance(normed, QuantizedInput) and total.dtype is dtype


@same_bits
@branches
def test_a_layer_that_is_run_again_in_backward_gives_the_same(branch: torch.dtype | None) -> None:
    wanted = step(Stream(True), inputs(torch.float32, branch))
    assert_same(step(Stream(True), inputs(torch.float32, branch), recompute=True), wanted)


@needs_triton
@dtypes
def test_kernels_numbers_are_torchs_but_for_a_last_place(dtype: torch.dtype) -> None:
    plain, fused = (step(Stream(fuse, "triton"), inputs(dtype, torch.bfloat16)) for fuse in (False, True))
    for name, theirs in plain.items():
        # see test_fused.py: 9e-4 a GEMM, of which three follow each other; BF16 gradients are rounded where the others
        # are, so that 8e-4 of them may differ by 2^-8
        assert (fused[name].float() - theirs.float()).norm() <= 3 * 9e-4 * theirs.float().norm(), name


def test_backward_is_one_operator_for_all_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the stream's gradient is left to add up or to round."""
    stream, (x, branch) = Stream(True), inputs(torch.float32, torch.bfloat16)
    total, normed = stream.norm(x, branch)
    given = normal(*TOKENS, K, seed=3).to(DEVICE), normal(*TOKENS, K, seed=5).to(DEVICE)
    calls = []

    def spy(*arguments: object) -> list[Tensor]:
        calls.append(arguments)
        return OPS.rms_norm_backward(*arguments)

    monkeypatch.setattr("fp8train.nn.fused_norm.OPS", type("Ops", (), {"rms_norm_backward": staticmethod(spy)}))
    torch.autograd.backward([total, normed.x], given)
    (arguments,) = calls
    assert torch.equal(arguments[4], given[0].view(-1, K)) and arguments[5] is torch.bfloat16
    assert x.grad.dtype is torch.float32 and torch.equal(branch.grad, x.grad.bfloat16())


@pytest.mark.parametrize("used", ["total", "norm"])
@branches
def test_either_result_may_go_unused(used: str, branch: torch.dtype | None) -> None:
    found = []
    for fuse in (False, True):
        stream, tensors = Stream(fuse), inputs(torch.float32, branch)
        total, normed = stream.norm(*tensors)
        (total if used == "total" else stream.linear(normed)).square().sum().backward()
        found.append([tensor.grad for tensor in (*tensors, stream.norm.weight) if tensor is not None])
    for plain, fused in zip(*found, strict=True):
        assert (plain is None) == (fused is None)
        if plain is not None and DEVICE == "cpu":
            assert torch.equal(plain, fused)


def test_a_hook_on_the_stream_sees_its_sum() -> None:
    stream, (x, branch) = Stream(True), inputs(torch.float32, torch.bfloat16)
    seen: list[tuple[Tensor, Tensor]] = []
    stream.norm.register_forward_hook(lambda _, args, made: seen.append(made))
    total, normed = stream.norm(x, branch)
    assert type(normed) is Tensor and torch.equal(total, x + branch)
    assert seen[0][0] is total and bool(seen[0][1].isfinite().all())


def test_nothing_but_the_sum_and_its_rows_is_kept() -> None:
    stream, (x, branch) = Stream(True), inputs(torch.float32, torch.bfloat16)
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.__setitem__(tensor.data_ptr(), tensor.nbytes) or tensor, lambda tensor: tensor
    ):
        total, _ = stream.norm(x, branch)
    assert kept.pop(stream.norm.weight.data_ptr()) and kept.pop(total.data_ptr()) == 4 * total.numel()
    assert sum(kept.values()) == 4 * TOKENS[0] * TOKENS[1]  # rstd


@same_bits
@pytest.mark.parametrize(
    ("x", "branch"),
    [((2, 3, K), (3, K)), ((3, K), (1,))],
    ids=["broadcast", "one number"],
)
def test_branches_of_another_shape_take_the_plain_way(x: tuple[int, ...], branch: tuple[int, ...]) -> None:
    tensors = normal(*x, seed=1, dtype=torch.float32), normal(*branch, seed=2, dtype=torch.float32)
    made = [Stream(fuse).norm(*tensors) for fuse in (False, True)]
    assert all(isinstance(normed, Tensor) for _, normed in made)
    assert all(map(torch.equal, *made))


def test_it_gives_back_the_plain_module() -> None:
    fused = Stream(True).norm
    assert isinstance(fused, FusedAddRMSNorm) and "fused into 1 linears" in repr(fused)
    assert type(plain_module(fused)) is AddRMSNorm
