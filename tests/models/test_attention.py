"""RoPE, masks and grouped-query attention against slow definitions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fp8train.models import ModelConfig, RopeScaling
from fp8train.models.attention import Attention, apply_rope, document_mask, rope_frequencies, rope_tables

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=4, num_kv_heads=2, max_seq_len=64,
    activations="float32",
)  # fmt: skip


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rope_multiplies_complex_pairs_by_unit_phases():
    x = randn(2, 3, 50, 16)
    cos, sin = rope_tables(CONFIG, 50, CPU)
    phases = torch.arange(50).double()[:, None] * 10000.0 ** (-torch.arange(8).double() / 8)
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double()) * torch.polar(torch.ones_like(phases), phases)
    exact = torch.cat((pairs.real, pairs.imag), dim=-1)
    # the angle of position 50 is rounded at 50 * 2^-24, a few roundings of the products on top; |x| < 5
    assert (apply_rope(x, cos, sin, torch.float32).double() - exact).abs().max() < 5 * (50 + 4) * 2**-24


def test_rope_makes_scores_depend_on_distance_alone():
    q, k = randn(1, 1, 1, 16, seed=1).expand(1, 1, 40, 16), randn(1, 1, 1, 16, seed=2).expand(1, 1, 40, 16)
    cos, sin = rope_tables(CONFIG, 40, CPU)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return apply_rope(x, cos, sin, torch.float32)

    scores = (rotate(q) @ rotate(k).transpose(-1, -2))[0, 0]
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4  # |q||k| about 16, angles off by at most 40 * 2^-24


def test_rope_in_bf16_rounds_only_its_result():
    x = randn(1, 2, 30, 16).to(torch.bfloat16)
    cos, sin = rope_tables(CONFIG, 30, CPU)
    assert cos.dtype == torch.float32
    assert torch.equal(apply_rope(x, cos, sin, torch.float32), apply_rope(x.float(), cos, sin, torch.float32))
    rotated = apply_rope(x.float(), cos, sin, torch.float32).to(torch.bfloat16)
    assert torch.equal(apply_rope(x, cos, sin, torch.bfloat16), rotated)


def test_llama3_scaling_keeps_short_and_divides_long_wavelengths():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    config = dataclasses.replace(CONFIG, head_dim=128, rope_theta=500000.0)
    plain = rope_frequencies(128, 500000.0, None, CPU)
    scaled = rope_frequencies(128, 500000.0, (8.0, 1.0, 4.0, 8192), CPU)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    # by hand: 500000^(i/64) * 2 pi is below 2048 for i < 28.2 and above 8192 for i > 34.98
    assert short.sum() == 29 and long.sum() == 29
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8)
    between = ~(short | long)
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()
    for one, frequencies in ((config, plain), (dataclasses.replace(config, rope_scaling=scaling), scaled)):
        cos, sin = rope_tables(one, 2, CPU)
        assert torch.equal(cos[1], frequencies.cos()) and torch.equal(sin[1], frequencies.sin())


@pytest.mark.parametrize("scaling", [None, (8.0, 1.0, 4.0, 8192.0)], ids=["plain", "llama3"])
def test_opcheck_accepts_the_operator_of_the_tables(scaling):
    torch.library.opcheck(torch.ops.fp8train.rope_tables.default, (20, 16, 10000.0, scaling, CPU))


def test_tables_on_the_meta_device_have_the_layout_of_real_ones():
    real, meta = rope_tables(CONFIG, 20, CPU), rope_tables(CONFIG, 20, torch.device("meta"))
    for one, other in zip(real, meta, strict=True):
        assert other.is_meta
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def slow_attention(layer: Attention, x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Attention head by head, with scores written out; allowed [B, T, T]."""
    cos, sin = rope_tables(CONFIG, x.shape[1], CPU)
    q, k, v = (linear(x).view(*x.shape[:2], -1, 16) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    heads = []
    for head in range(4):
        group = head // 2
        alone = q[:, None, :, head], k[:, None, :, group]  # [B, 1, T, head_dim]
        qh, kh = (apply_rope(x, cos, sin, torch.float32)[:, 0] for x in alone)
        scores = (qh @ kh.transpose(1, 2) / math.sqrt(16)).masked_fill(~allowed, -math.inf)
        heads.append(scores.softmax(-1) @ v[:, :, group])
    return layer.o_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("documents", [None, [5, 1, 14]], ids=["causal", "documents"])
def test_grouped_attention_equals_its_definition(documents):
    torch.manual_seed(0)
    layer, x = Attention(CONFIG), randn(2, 20, 64, seed=3)
    allowed = torch.ones(2, 20, 20, dtype=torch.bool).tril()
    mask = None
    if documents is not None:
        ids = torch.repeat_interleave(torch.tensor([7, 8, 9]), torch.tensor(documents)).expand(2, 20)
        allowed &= ids[:, :, None] == ids[:, None, :]
        mask = document_mask(ids, torch.float32)
    cos, sin = rope_tables(CONFIG, 20, CPU)
    ours, slow = layer(x, cos, sin, mask), slow_attention(layer, x, allowed)
    # a chain of five operations over at most 64 terms: 5 * sqrt(64) * 2^-24
    assert (ours - slow).norm() <= 40 * 2**-24 * slow.norm()


def test_one_document_masks_what_causal_masks():
    mask = document_mask(torch.zeros(1, 6, dtype=torch.int32), torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and mask.shape == (1, 1, 6, 6)
    assert torch.equal(mask[0, 0] == 0, torch.ones(6, 6, dtype=torch.bool).tril())
