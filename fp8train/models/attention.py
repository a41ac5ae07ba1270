"""Rotary embedding, document mask and grouped-query attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8train.models.config import ModelConfig
from fp8train.models.norm import RMSNorm


def rope_frequencies(head_dim: int, theta: float, scaling: Sequence[float] | None, device: torch.device) -> Tensor:
    """Rotary frequencies in radians per token, [head_dim / 2] fp32: theta^(-2i / head_dim), stretched by `scaling`.

    Args:
        head_dim: channels per head.
        theta: base of the frequencies.
        scaling: the fields of RopeScaling in their order; None is off.
        device: of the result.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    # FP32 throughout, like the models whose weights we read: they were trained with these rounded frequencies
    frequencies = 1.0 / (theta**exponents)
    return frequencies if scaling is None else _stretch(frequencies, *scaling)


def _stretch(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_seq_len: float
) -> Tensor:
    """Llama 3 scaling of the frequencies. Source: Llama 3 (arXiv:2407.21783) and Meta's reference code."""
    wavelengths = 2 * math.pi / frequencies
    smooth = (original_max_seq_len / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - smooth) * (frequencies / factor) + smooth * frequencies
    stretched = torch.where(wavelengths > original_max_seq_len / low_freq_factor, frequencies / factor, between)
    return torch.where(wavelengths < original_max_seq_len / high_freq_factor, frequencies, stretched)


def _compute_tables(
    seq_len: int, head_dim: int, theta: float, scaling: Sequence[float] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rope_frequencies(head_dim, theta, scaling, device))
    return angles.cos(), angles.sin()


def _fake_tables(
    seq_len: int, head_dim: int, theta: float, scaling: Sequence[float] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    cos = torch.empty(seq_len, head_dim // 2, dtype=torch.float32, device=device)
    return cos, torch.empty_like(cos)


# Not custom_op: its first call imports torch._dynamo, 6 s of one CPU core that eager runs do not need (torch 2.13).
# CompositeExplicitAutograd serves every device: a call without tensors asks for the key of none.
_LIBRARY = torch.library.Library("fp8train", "FRAGMENT")
_LIBRARY.define(
    "rope_tables(SymInt seq_len, SymInt head_dim, float theta, float[]? scaling, Device device) -> (Tensor, Tensor)"
)
_LIBRARY.impl("rope_tables", _compute_tables, "CompositeExplicitAutograd")
torch.library.register_fake("fp8train::rope_tables", _fake_tables, lib=_LIBRARY)


def rope_tables(config: ModelConfig, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, [seq_len, head_dim / 2] fp32 each.

    Computed in each forward rather than kept in a buffer: it is a few small operations, and a model that was laid out
    on the meta device has nothing to restore. They are one operator, opaque to torch.compile: left to itself, inductor
    takes pow, cos and sin for every element of each layer's rotations, forward and backward, in kernels of 0.5 ms where
    0.03 ms would do, 8 of a step's 150 ms (H200, torch 2.11, 4 layers of the 8B shape).
    """
    stretch = config.rope_scaling
    scaling = stretch and (
        stretch.factor,
        stretch.low_freq_factor,
        stretch.high_freq_factor,
        stretch.original_max_seq_len,
    )
    return torch.ops.fp8train.rope_tables(seq_len, config.head_dim, config.rope_theta, scaling, device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate channel i with channel i + head_dim / 2 (Hugging Face layout), in FP32.

    The halves are exchanged by flip and not put together by cat: inductor makes one kernel of flip and the products,
    and of cat FP32 buffers that a second kernel reads.

    Args:
        x: [B, heads, T, head_dim].
        cos, sin: [T, head_dim / 2] fp32.
        dtype: of the result.

    Returns:
        Tensor: [B, heads, T, head_dim], a view of contiguous memory [B, T, heads, head_dim]: attention's result has
        the layout of its queries, and o_proj reads this one without a copy.
    """
    halves = x.transpose(1, 2).float().unflatten(-1, (2, -1))
    turned = halves * cos[:, None, None] + halves.flip(-2) * torch.stack((-sin, sin), dim=1)[:, None]
    return turned.flatten(-2).to(dtype).transpose(1, 2)


class Rope(nn.Module):
    """apply_rope as a module, for conversion to give it a kernel."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """See apply_rope."""
        return apply_rope(x, cos, sin, dtype)


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask: 0 where a key is in the query's document and not after it, -inf elsewhere.

    Additive and built once, because scaled_dot_product_attention would turn a boolean mask into this one in every
    layer, and save it there.

    Args:
        document_ids: [B, T] integers.
        dtype: dtype of the queries.

    Returns:
        Tensor: [B, 1, T, T].
    """
    seq_len = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=document_ids.device).tril()
    mask = torch.zeros(same.shape, dtype=dtype, device=document_ids.device)
    return mask.masked_fill(~(same & causal), -math.inf)[:, None]


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE; the projections are plain nn.Linear."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        self.dtype = config.attention_dtype
        self.groups = config.num_heads // config.num_kv_heads
        options = {"device": device, "dtype": torch.float32}
        self.q_proj = nn.Linear(config.hidden_size, config.q_size, bias=config.qkv_bias, **options)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_size, bias=config.qkv_bias, **options)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_size, bias=config.qkv_bias, **options)
        self.o_proj = nn.Linear(config.q_size, config.hidden_size, bias=False, **options)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, device=device) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, device=device) if config.qk_norm else None
        self.rope = Rope()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: [B, T, hidden].
            cos, sin: [T, head_dim / 2] fp32.
            mask: [B, 1, T, T] additive, causal part included; None is plain causal.

        Returns:
            Tensor: [B, T, hidden].
        """
        batch, seq_len, _ = x.shape
        q = self.q_proj(x).view(batch, seq_len, -1, self.head_dim)
        k = self.k_proj(x).view(batch, seq_len, -1, self.head_dim)
        v = self.v_proj(x).view(batch, seq_len, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = self.rope(q.transpose(1, 2), cos, sin, self.dtype)
        k = self.rope(k.transpose(1, 2), cos, sin, self.dtype)
        y = self._attend(q, k, v.to(self.dtype), mask).to(x.dtype)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq_len, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None and q.dtype == torch.bfloat16:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups > 1)
        if self.groups > 1:
            # on CUDA only the flash kernel (16-bit, no mask) reads grouped heads; the others would fall back to
            # materialised T x T scores
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
