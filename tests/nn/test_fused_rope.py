"""Rotary embedding by a kernel in whole models, BF16 and FP8: the bits of the formula, and who gets it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends import get_backend  # noqa: E402
from fp8train.backends.cpu import CpuBackend  # noqa: E402
from fp8train.backends.triton import TritonBackend  # noqa: E402
from fp8train.convert import convert_model  # noqa: E402
from fp8train.models import Decoder, ModelConfig, build_model, initialize  # noqa: E402
from fp8train.models.attention import Rope, apply_rope  # noqa: E402
from fp8train.nn.fused_rope import FusedRope, fused_rope  # noqa: E402
from tests.kernels.products import DEVICE  # noqa: E402
from tests.nn.precisions import assert_same  # noqa: E402

recipes = pytest.mark.parametrize("recipe", ["bf16", "blockwise"])


def decoder(recipe: str = "bf16", fused: str = "never", *, kernel: bool = False, **options: str) -> Decoder:
    """Two layers on the device under test, rotated by the formula, or by the kernel; linears run on the CPU or auto."""
    sizes = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 160, "num_heads": 6, "num_kv_heads": 3}
    config = ModelConfig(
        **sizes, name="tiny", num_layers=2, head_dim=32, max_seq_len=64, **({"activations": "bfloat16"} | options)
    )
    model = build_model(config, DEVICE)
    initialize(model, 1)
    convert_model(model, recipe, backend="cpu" if DEVICE == "cpu" else "auto", fused=fused)
    for layer in model.layers if kernel else ():
        layer.self_attn.rope = fused_rope(layer.self_attn.rope, "triton")
    return model


def ropes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules() if isinstance(module, Rope | FusedRope)]


def tokens() -> tuple[Tensor, Tensor]:
    drawn = torch.randint(0, 64, (2, 38), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return drawn[:, :-1], drawn[:, 1:]


def step(model: nn.Module, documents: Tensor | None = None) -> dict[str, Tensor]:
    """The loss and every gradient."""
    loss = model(*tokens(), documents)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


@recipes
def test_training_has_the_bits_of_the_formula(recipe: str) -> None:
    assert_same(step(decoder(recipe, kernel=True)), step(decoder(recipe)))


@pytest.mark.parametrize(
    ("activations", "attention"), [("float32", "auto"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_every_dtype_of_activations_and_attention_has_the_bits_of_the_formula(activations: str, attention: str) -> None:
    options = {"activations": activations, "attention": attention}
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor([10, 1, 26])).expand(2, 37).to(DEVICE)
    made, wanted = (step(decoder(kernel=kernel, **options), documents) for kernel in (True, False))
    assert_same(made, wanted)


def test_gradients_have_gradients() -> None:
    x = torch.randn(1, 2, 5, 8, device=DEVICE, requires_grad=True)
    cos, sin = (torch.rand(5, 4, device=DEVICE) for _ in range(2))

    def second(rope: Callable[..., Tensor]) -> Tensor:
        y = rope(x, cos, sin, torch.float32).pow(3)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), x)[0]

    assert torch.equal(second(fused_rope(Rope(), "triton")), second(apply_rope))


@recipes
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointing_changes_no_bit(recipe: str, checkpointing: str) -> None:
    model = decoder(recipe, kernel=True)
    model.checkpointing = checkpointing
    assert_same(step(model), step(decoder(recipe)))


def test_without_gradients_nothing_is_kept_and_the_bits_are_the_same() -> None:
    with torch.no_grad():
        logits = decoder(kernel=True)(tokens()[0])
        assert torch.equal(logits, decoder()(tokens()[0])) and logits.grad_fn is None


def test_compiled_model_keeps_the_formula() -> None:
    torch.compiler.reset()
    model, traced = decoder(kernel=True), []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        traced.append(graph.print_readable(print_output=False))
        return graph

    compiled = step(torch.compile(copy.deepcopy(model), backend=keep, fullgraph=True, dynamic=False))
    prefix = "_orig_mod."
    assert_same({name.removeprefix(prefix): tensor for name, tensor in compiled.items()}, step(model))
    assert "fp8train.rope_tables(" in traced[0] and not any("fp8train.rope." in code for code in traced)


def test_only_the_angles_are_kept_for_backward() -> None:
    rotation = fused_rope(Rope(), "triton")
    x = torch.randn(1, 2, 5, 8, device=DEVICE, requires_grad=True)
    cos, sin = torch.rand(2, 5, 4, device=DEVICE)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        y = rotation(x, cos, sin, torch.bfloat16)
    assert [tensor.data_ptr() for tensor in kept] == [cos.data_ptr(), sin.data_ptr()]
    y.sum().backward()  # a gradient whose strides are all 0
    assert x.grad is not None and x.grad.dtype is torch.float32
    mine, x.grad = x.grad, None
    apply_rope(x, cos, sin, torch.bfloat16).sum().backward()
    assert torch.equal(mine, x.grad)


def test_dtypes_without_a_kernel_take_the_formula() -> None:
    rotation, (cos, sin) = fused_rope(Rope(), "triton"), torch.rand(2, 5, 4, device=DEVICE)
    x = torch.randn(1, 2, 5, 8, device=DEVICE, dtype=torch.float16)
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(rotation(x, cos, sin, dtype), apply_rope(x, cos, sin, dtype))


@recipes
def test_conversion_gives_it_to_whatever_precision_if_the_backend_has_one(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        assert ropes(decoder(recipe, "auto")) == [Rope, Rope]
        monkeypatch.setattr(CpuBackend, "has_rope", lambda self: True)
    assert ropes(decoder(recipe, "auto")) == [FusedRope, FusedRope]
    assert ropes(decoder(recipe, "never")) == [Rope, Rope]
    model = decoder(recipe, "always")
    assert ropes(model) == [FusedRope, FusedRope]
    assert list(model.state_dict()) == list(decoder(recipe).state_dict())
    convert_model(model, recipe, backend="reference", fused="auto")
    assert ropes(model) == [Rope, Rope], "a second conversion puts the plain one back"


def test_a_rope_of_another_class_or_forward_is_left_alone() -> None:
    class Other(Rope):
        pass

    model = decoder()
    model.layers[0].self_attn.rope = Other()
    model.layers[1].self_attn.rope.forward = lambda *args: apply_rope(*args)
    report = convert_model(model, "bf16", backend="reference", fused="always")
    assert ropes(model) == [Other, Rope]
    assert [(row.fqn, row.refusal) for row in report.ropes] == [
        ("layers.1.self_attn.rope", "it has a forward of its own")
    ]


def test_report_says_where_a_kernel_rotates_and_why_the_formula_does_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model, missing = decoder(), "backend reference has no kernel for it"
    paths = [f"layers.{number}.self_attn.rope" for number in range(2)]
    cases = [("always", False, missing), ("auto", False, missing), ("auto", True, None), ("never", True, "fused=never")]
    for fused, has, why in cases:
        monkeypatch.setattr(type(get_backend("reference")), "has_rope", lambda self, has=has: has)
        report = convert_model(model, "bf16", backend="reference", fused=fused)
        assert [(row.fqn, row.refusal) for row in report.ropes] == [(path, why) for path in paths]
        assert report.to_dict()["ropes"][0] == {"fqn": paths[0], "kernel": why is None, "reason": why}
    model.layers[1].self_attn.rope = model.layers[0].self_attn.rope
    (row,) = convert_model(model, "bf16", backend="reference", fused="always").ropes
    assert (row.fqn, row.refusal) == (paths[0], "the model uses it in several places")


@recipes
def test_a_backend_without_a_kernel_rotates_by_the_formula(recipe: str) -> None:
    """As with fused=always, and where the kernel was refused."""
    model = decoder(recipe)
    for layer in model.layers:
        layer.self_attn.rope = fused_rope(layer.self_attn.rope, "reference")
    assert_same(step(model), step(decoder(recipe)))


def test_backends_with_our_quantisers_have_it_and_the_definitions_have_not() -> None:
    for name, has in (("triton", True), ("cublaslt", True), ("reference", False), ("dequant_bf16", False)):
        assert get_backend(name).has_rope() is has, name
    assert isinstance(get_backend("cublaslt").quantisers, TritonBackend)  # type: ignore[attr-defined]
