"""Fused modules in whole models: what conversion swaps and says, training, checkpointing, compilation, observers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fp8train.backends.cpu import CpuBackend
from fp8train.conversion_report import ConversionReport
from fp8train.convert import convert_model
from fp8train.explain import explanation
from fp8train.metrics import read_metrics
from fp8train.models import Decoder, ModelConfig, build_model, initialize
from fp8train.models.norm import AddRMSNorm
from fp8train.nn.fused_mlp import FusedMLP
from fp8train.nn.fused_norm import FusedRMSNorm
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import converted_linears, evaluation_precision, named_linears
from fp8train.quant.formats import BF16, BLOCKWISE
from fp8train.recipe import load_recipe
from fp8train.telemetry.observer import Observer
from fp8train.trainer.strict_coverage import StepAudit
from tests.nn import precisions
from tests.tiny_run import tiny_train

SIZES = {"vocab_size": 64, "hidden_size": 136, "intermediate_size": 200, "num_heads": 4, "num_kv_heads": 2}
PRODUCERS = ("input_layernorm", "post_attention_layernorm", "mlp")


def decoder(fused: str, recipe: object = "blockwise", residual: str = "bfloat16") -> tuple[Decoder, ConversionReport]:
    """Two layers. In BF16 a residual's gradient is the sum of BF16 numbers, which has the same bits in both arms; in
    FP32 autograd adds the two terms of a plain norm's gradient to the residual's one by one."""
    config = ModelConfig(
        **SIZES, name="tiny", num_layers=2, head_dim=34, max_seq_len=64, activations="bfloat16", residual=residual
    )
    model = build_model(config)
    initialize(model, 1)
    return model, convert_model(model, recipe, backend="cpu", fused=fused)  # type: ignore[arg-type]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 64, (2, 41), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def train(
    model: nn.Module, steps: int = 3, call: Callable[..., Tensor] | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of steps of two micro-batches each, and the gradients of the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for number in range(steps):
        optimizer.zero_grad()
        for micro_batch in (0, 1):
            loss = (model if call is None else call)(*batch(2 * number + micro_batch))
            loss.backward()
            losses.append(loss.item())
        if number < steps - 1:
            optimizer.step()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]) -> None:
    assert one[0] == other[0]
    precisions.assert_same(one[1], other[1])


def fused_modules(model: nn.Module) -> list[str]:
    return [fqn for fqn, module in model.named_modules() if isinstance(module, FusedRMSNorm | FusedMLP)]


EVERY = [f"layers.{layer}.{name}" for layer in (0, 1) for name in PRODUCERS]


@pytest.mark.parametrize("recipe", ["blockwise", "deepseek_v3", "tensorwise"])
def test_training_has_the_bits_of_the_plain_model(recipe: str) -> None:
    plain, fused = decoder("never", recipe)[0], decoder("always", recipe)[0]
    assert fused_modules(plain) == [] and sorted(fused_modules(fused)) == sorted(EVERY)
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert_same(train(plain), train(fused))


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointing_changes_no_bit(checkpointing: str) -> None:
    model = decoder("always")[0]
    wanted = train(copy.deepcopy(model))
    model.checkpointing = checkpointing
    assert_same(train(model), wanted)


def test_selective_checkpointing_repeats_no_gemm() -> None:
    counted = []
    for fused in ("never", "always"):
        model, report = decoder(fused)
        model.checkpointing = "selective"
        train(model, steps=1)
        calls = [row["gemms"][gemm]["fp8_calls"] for row in report.coverage()["linears"] for gemm in ("fprop", "dgrad")]
        counted.append(calls)
    assert counted[0] == counted[1] and set(counted[0]) == {2, 0}  # two micro-batches; lm_head is in BF16


@pytest.mark.parametrize(
    ("checkpointing", "residual"), [("none", "bfloat16"), ("full", "float32"), ("selective", "bfloat16")]
)
def test_compiled_model_has_the_eager_ones_bits(checkpointing: str, residual: str) -> None:
    torch.compiler.reset()
    model = decoder("always", residual=residual)[0]
    model.checkpointing = checkpointing
    eager = train(copy.deepcopy(model), steps=1)
    compiled = train(model, 1, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False))
    assert_same(compiled, eager)


def test_compiled_model_follows_a_change_of_precision() -> None:
    torch.compiler.reset()
    model = decoder("always")[0]
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for precision in (None, BF16, BLOCKWISE):
        for linear in [] if precision is None else [*converted_linears(model), *converted_linears(eager)]:
            linear.set_precision(precision)
        assert_same(train(model, 1, compiled), train(eager, 1))


def test_fp32_residual_gets_the_same_forward_and_gradients_within_roundings_of_its_sum() -> None:
    plain, fused = (decoder(choice, residual="float32")[0] for choice in ("never", "always"))
    watched = copy.deepcopy(fused)
    for linear in converted_linears(watched):
        linear.register_forward_hook(lambda *_: None)
    results = [train(model, steps=1) for model in (plain, fused, watched)]
    assert results[0][0] == results[1][0]
    assert_same(results[1], results[2])
    for name, gradient in results[0][1].items():
        # a sum of three FP32 terms in another order, once a norm: 2^-23 of the terms, of which there are 4 norms; where
        # that moves a BF16 rounding of a gradient (one number in 2^14), by 2^-8 of it: 2^-8 * 2^-7 together
        assert (results[1][1][name] - gradient).norm() <= 2.0**-15 * gradient.norm(), name


def test_evaluation_in_bf16_and_back() -> None:
    plain, fused = decoder("never")[0], decoder("always")[0]
    for model in (plain, fused):
        train(model, steps=2)
    with evaluation_precision(plain, BF16), evaluation_precision(fused, BF16), torch.no_grad():
        assert torch.equal(plain(*batch(9)), fused(*batch(9)))
    assert_same(train(plain, steps=1), train(fused, steps=1))


def test_reports_say_what_was_fused_and_why_not() -> None:
    model, report = decoder("always")
    assert [(row.fqn, row.refusal) for row in report.producers] == [(fqn, None) for fqn in EVERY]
    text = explanation("tiny", model, load_recipe("blockwise"), report, "fp32")
    assert "  layers.{0,1}.input_layernorm -> q_proj, k_proj, v_proj\n" in text
    assert "  layers.{0,1}.mlp -> gate_proj, up_proj, down_proj\n" in text
    model, report = decoder("auto")
    assert fused_modules(model) == []
    text = explanation("tiny", model, load_recipe("blockwise"), report, "fp32")
    example = "layers.0.input_layernorm -> q_proj, k_proj, v_proj"
    assert f"  6, e.g. {example}: backend cpu has no kernel for it\n" in text
    assert report.to_dict()["producers"][0] == {
        "fqn": "layers.0.input_layernorm",
        "linears": [f"layers.0.self_attn.{name}_proj" for name in "qkv"],
        "fused": False,
        "reason": "backend cpu has no kernel for it",
    }


def test_auto_fuses_what_the_backend_has_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fuses(self: CpuBackend, row: object, col: object) -> bool:
        asked.append((str(row), str(col)))
        return True

    monkeypatch.setattr(CpuBackend, "fuses", fuses)
    assert sorted(fused_modules(decoder("auto", {**FP8, "rules": [{"match": "*", "use": "fp8"}]})[0])) == sorted(EVERY)
    x, dy = ("e4m3 1x128 pow2",) * 2, ("e5m2 1x128 pow2", "e5m2 1x128 pow2")
    assert asked == [x, dy] * 2 + [x] * 4  # of two layers the product and its gradients; then two norms of each


FP8 = {
    "version": 1,
    "precisions": {
        "fp8": {
            "fprop": {"x": "e4m3 1x128", "w": "e4m3 128x128"},
            "dgrad": {"dy": "e5m2 1x128", "w": "e4m3 128x128"},
            "wgrad": {"dy": "e5m2 1x128", "x": "e4m3 1x128"},
        }
    },
}


def test_recipes_decide_module_by_module() -> None:
    rules = [{"match": "*.0.mlp.down_proj", "use": "bf16"}, {"match": "*.1.self_attn.v_proj", "use": "bf16"}]
    rules += [{"match": "*layers.*", "use": "fp8"}, {"match": "*", "use": "bf16"}]
    model, report = decoder("always", {**FP8, "rules": rules})
    refused = {row.fqn: row.refusal for row in report.producers if row.refusal is not None}
    assert refused == {
        "layers.0.mlp": "bf16 does not read the input in FP8 in both fprop and wgrad",
        "layers.1.input_layernorm": "they differ in precision: fp8 and bf16",
    }
    assert sorted(fused_modules(model)) == sorted(set(EVERY) - set(refused))
    assert_same(train(model, 2), train(decoder("never", {**FP8, "rules": rules})[0], 2))


def test_a_second_conversion_starts_from_plain_modules() -> None:
    model, _ = decoder("always")
    wanted = train(copy.deepcopy(model), 1)
    convert_model(model, "blockwise", backend="cpu", fused="never")
    assert fused_modules(model) == [] and type(model.layers[0].input_layernorm) is AddRMSNorm
    convert_model(model, "bf16", backend="cpu", fused="always")
    assert fused_modules(model) == []
    for _ in (1, 2):
        convert_model(model, "blockwise", backend="cpu", fused="always")
    assert sorted(fused_modules(model)) == sorted(EVERY)
    assert model.layers[0].mlp.fusion.plain.__name__ == "MLP"
    assert_same(train(model, 1), wanted)


def test_models_are_laid_out_on_the_meta_device_and_filled_later() -> None:
    model = build_model(decoder("never")[0].config, "meta")
    convert_model(model, "blockwise", backend="cpu", fused="always")
    model.to_empty(device="cpu")
    initialize(model, 1)
    for linear in converted_linears(model):
        linear.refresh_weight()
    assert_same(train(model, 1), train(decoder("always")[0], 1))


class Subclass(nn.Linear):
    """With a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    ("change", "fqn", "why"),
    [
        (lambda m: setattr(m, "norm", m.layers[0].input_layernorm), EVERY[0], "several places"),
        (lambda m: setattr(m.layers[0].mlp, "forward", lambda x: x), EVERY[2], "a forward of its own"),
        (lambda m: setattr(m.layers[0].mlp, "up_proj", nn.Linear(136, 200)), EVERY[2], "a bias of gate_proj"),
        (lambda m: setattr(m.layers[1].self_attn, "k_proj", Subclass(136, 68)), EVERY[3], "left as it is"),
    ],
    ids=["shared", "forward", "bias", "subclass"],
)
def test_what_does_not_permit_stays_plain(change: Callable[[Decoder], None], fqn: str, why: str) -> None:
    config = ModelConfig(**SIZES, name="tiny", num_layers=2, head_dim=34, max_seq_len=64)
    model = build_model(config)
    change(model)
    rules = [{"match": "*layers.1.self_attn.k_proj", "use": "bf16"}, {"match": "*", "use": "fp8"}]
    report = convert_model(model, {**FP8, "rules": rules}, backend="cpu", fused="always")
    row = next(row for row in report.producers if row.fqn == fqn)
    assert why in str(row.refusal) and fqn not in fused_modules(model)


class Norm(AddRMSNorm):
    """Computes something else, for all we know."""


def test_unknown_classes_are_left_alone() -> None:
    model = build_model(decoder("never")[0].config)
    model.layers[0].input_layernorm.__class__ = Norm
    report = convert_model(model, "blockwise", backend="cpu", fused="always")
    assert EVERY[0] not in [row.fqn for row in report.producers] and type(model.layers[0].input_layernorm) is Norm


def test_choice_has_three_names() -> None:
    with pytest.raises(ValueError, match="fused is 'yes'; needs one of auto, always, never"):
        decoder("yes")


def test_remedies_of_down_projections_keep_the_mlp_plain() -> None:
    recipe = {**FP8, "rules": [{"match": "*", "use": "fp8"}], "swiglu": {"match": "*down_proj", "clamp": 3.0}}
    model, report = decoder("always", recipe)
    assert {row.refusal for row in report.producers if row.fqn.endswith("mlp")} == {
        "a remedy treats the input before it is rounded"
    }


def test_observers_see_what_they_see_in_the_plain_model() -> None:
    seen = []
    for fused in ("never", "always"):
        model = decoder(fused)[0]
        observer = Observer(named_linears(model), BF16, None)
        observer.begin()
        losses = train(model, steps=1)
        seen.append((observer.end(), losses[0]))
    assert seen[0] == seen[1] and len(seen[0][0]) == 5 * len(named_linears(decoder("never")[0])) - 5


def test_strict_audits_leave_fused_modules_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = decoder("always")
    audit = StepAudit(SimpleNamespace(model=model, report=report), False)  # type: ignore[arg-type]
    called = []
    forward = Float8Linear.forward
    monkeypatch.setattr(Float8Linear, "forward", lambda self, x: (called.append(self), forward(self, x))[1])
    audit.begin()
    train(model, steps=1)
    problems, reasons = audit.end()
    assert problems == [] and reasons == {}
    gates = [layer.mlp.gate_proj for layer in model.layers]
    assert not any(gate in called for gate in gates)  # an MLP that was not fused would call it


def test_a_run_has_the_same_losses(tmp_path: Path) -> None:
    rows = []
    for fused in ("never", "always"):
        options = ("model.residual=bfloat16", "telemetry.every=2", "eval.every=3", "micro_batch_samples=4")
        tiny_train(tmp_path, f"fused={fused}", *options, run=fused)
        rows.append([row.get("loss", row.get("eval_loss")) for row in read_metrics(tmp_path / fused / "metrics.jsonl")])
    assert rows[0] == rows[1] and len(rows[0]) > 6


transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_transformers_models_are_fused_with_the_same_bits(family: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, attn_implementation="eager")
    torch.manual_seed(0)
    plain = getattr(transformers, f"{family}ForCausalLM")(config)
    fused = copy.deepcopy(plain)
    convert_model(plain, "blockwise", backend="cpu", fused="never")
    report = convert_model(fused, "blockwise", backend="cpu", fused="always")
    assert sorted(fused_modules(fused)) == sorted(f"model.{fqn}" for fqn in EVERY)
    assert all(row.refusal is None for row in report.producers)
    tokens = batch(0)[0]
    results = []
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        # the FP32 residual: see the test of it above
        assert (results[1][1][name] - gradient).norm() <= 2.0**-15 * gradient.norm(), name


def test_transformers_mlp_with_another_activation_is_no_swiglu() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4, hidden_act="gelu"))
    convert_model(model, "blockwise", backend="cpu", fused="always")
    assert fused_modules(model) == [f"model.{EVERY[0]}", f"model.{EVERY[1]}"]


def test_transformers_norm_of_bf16_stays_plain_since_it_rounds_early() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    convert_model(model, "blockwise", backend="cpu", fused="always")
    norm = model.model.layers[0].input_layernorm
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert not isinstance(norm(x), Tensor) and isinstance(norm(x.bfloat16()), Tensor)
