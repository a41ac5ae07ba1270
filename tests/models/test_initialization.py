"""Initial weights are a pure function of (seed, path)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fp8train.errors import ConfigError
from fp8train.models import ModelConfig, build_model, initialize

CONFIG = ModelConfig(
    vocab_size=250, vocab_multiple=64, hidden_size=128, intermediate_size=256, num_layers=3, num_heads=4,
    num_kv_heads=2, max_seq_len=64, qkv_bias=True, qk_norm=True,
)  # fmt: skip


def initialized(config: ModelConfig = CONFIG, seed: int = 1, device: str = "cpu") -> dict[str, torch.Tensor]:
    model = build_model(config, device)
    if device == "meta":
        model.to_empty(device="cpu")
    initialize(model, seed)
    return model.state_dict()


def test_same_seed_gives_the_same_bits_and_another_gives_others():
    torch.manual_seed(1)
    first = initialized(seed=7)
    torch.manual_seed(2)
    again, other = initialized(seed=7), initialized(seed=8)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if name.endswith("proj.weight"))


def test_weights_do_not_depend_on_the_threads_that_draw_them(monkeypatch):
    drawn = []
    for threads in (1, 5):  # of 23 matrices
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        drawn.append(initialized())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_weights_are_written_under_inference_mode():
    with torch.inference_mode():
        inferred = initialized()
    plain = initialized()
    assert all(torch.equal(plain[name], inferred[name]) for name in plain)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_model_from_the_meta_device_gets_the_same_bits(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    plain, empty = initialized(config), initialized(config, device="meta")
    assert plain.keys() == empty.keys()
    assert all(torch.equal(plain[name], empty[name]) for name in plain)


def test_weights_do_not_depend_on_the_other_modules():
    """As for a rank that holds some of the layers."""
    shallow = initialized(dataclasses.replace(CONFIG, num_layers=1, init_std=0.02))
    deep = initialized()
    for name in ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        assert torch.equal(shallow[name], deep[name]), name


def test_no_two_parameters_share_their_values():
    state = initialized()
    assert not torch.equal(state["layers.0.mlp.gate_proj.weight"], state["layers.0.mlp.up_proj.weight"])
    assert not torch.equal(state["layers.0.mlp.gate_proj.weight"], state["layers.1.mlp.gate_proj.weight"])


def test_spread_is_the_standard_one():
    for name, tensor in initialized().items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            # the estimate from n samples has the relative error 1/sqrt(2n); n >= 8192, five sigma
            assert abs(tensor.std() / std - 1) < 5 / math.sqrt(2 * tensor.numel()), name


def test_model_on_meta_is_refused():
    with pytest.raises(ConfigError, match="to_empty"):
        initialize(build_model(CONFIG, "meta"), seed=1)
