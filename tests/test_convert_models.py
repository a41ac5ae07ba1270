"""Conversion of whole language models, ours and those of Hugging Face."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8train.convert import convert_model
from fp8train.models import ModelConfig, build_model, initialize
from fp8train.nn.linear import Float8Linear
from fp8train.recipe import available_recipes
from tests.convertible_model import EVERYTHING, names_and_identities

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def ours(device: str = "cpu") -> nn.Module:
    config = ModelConfig(
        name="tiny", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
        max_seq_len=32, qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    return build_model(config, device)


def hf_llama(device: str = "cpu") -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config)


def hf_tied_qwen2(device: str = "cpu") -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    with torch.device(device):
        return transformers.Qwen2ForCausalLM(config)


BUILDERS = {"ours": ours, "hf_llama": hf_llama, "hf_tied_qwen2": hf_tied_qwen2}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipe_converts_without_edits(name: str, build, device: str) -> None:
    model = build(device)
    keys, identities = list(model.state_dict()), names_and_identities(model)
    report = convert_model(model, name, backend="cpu_torch")
    assert list(model.state_dict()) == keys
    assert names_and_identities(model) == identities
    assert all(type(module) is Float8Linear for module in model.modules() if isinstance(module, nn.Linear))
    by_name = {row.fqn: row for row in report.rows}
    assert len(by_name) == 2 * 7 + 1
    assert by_name["lm_head"].planned("fprop") == ("fp32" if name == "fp32" else "bf16")
    inside = {row.planned("fprop") for fqn, row in by_name.items() if fqn != "lm_head"}
    assert inside == {{"bf16": "bf16", "placebo": "bf16", "fp32": "fp32"}.get(name, "fp8")}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_converted_model_trains(build) -> None:
    torch.manual_seed(0)
    model = build()
    if build is ours:
        initialize(model, seed=1)
    convert_model(model, "blockwise", backend="cpu_torch")
    tokens = torch.randint(0, 64, (2, 16))
    loss = model(tokens, tokens) if build is ours else model(tokens, labels=tokens).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


def test_fp32_recipe_changes_no_number() -> None:
    torch.manual_seed(0)
    model = hf_llama().eval()
    tokens = torch.randint(0, 64, (2, 16))
    before = model(tokens).logits
    convert_model(model, "fp32", backend="cpu_torch")
    # FP32 sums of K <= 48 terms in another order: n * 2^-24 relative to logits of order 1
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=48 * 2**-24)


def test_tied_weights_stay_tied() -> None:
    model = hf_tied_qwen2()
    convert_model(model, "blockwise", backend="cpu_torch")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_eight_billion_parameters_are_laid_out_without_memory() -> None:
    config = ModelConfig(
        name="8b", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, max_seq_len=8192,
    )  # fmt: skip
    report = convert_model(build_model(config, "meta"), "blockwise")
    assert len(report.rows) == 32 * 7 + 1
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    head = 128256 * 4096
    assert report.planned_fp8_share() == pytest.approx(32 * layer / (32 * layer + head), rel=1e-12)
    assert sum(row.master_bytes for row in report.rows) == 4 * (32 * layer + head)


def test_decoder_keeps_its_lm_head() -> None:
    rows = {row.fqn: row.precision for row in convert_model(ours(), EVERYTHING, backend="cpu_torch").rows}
    assert rows["lm_head"] == "bf16" and rows["layers.0.mlp.up_proj"] == "fp8"
