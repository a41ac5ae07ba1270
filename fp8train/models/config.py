"""The shape of a decoder and the dtypes it computes in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fp8train.errors import ConfigError

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
ACTIVATIONS = ("auto", "bfloat16", "float32")
RESIDUALS = ("float32", "bfloat16")
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(kw_only=True, slots=True)
class RopeScaling:
    """Llama 3 stretch of the rotary frequencies (rope_type "llama3").

    Wavelengths above original_max_seq_len / low_freq_factor are divided by factor, those below original_max_seq_len /
    high_freq_factor stay, those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        if not (
            self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor and self.original_max_seq_len > 0
        ):
            raise ConfigError(
                f"model.rope_scaling: factor {self.factor}, low_freq_factor {self.low_freq_factor}, high_freq_factor "
                f"{self.high_freq_factor}, "
                f"original_max_seq_len {self.original_max_seq_len}; needs factor >= 1 and 0 < low < high. Llama 3.1 "
                "has 8, 1, 4, 8192."
            )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A Llama-style decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    A config whose sizes are left at 0 and that names init_from takes its shape from that folder (preset model=hf).

    name: shown in logs and reports
    vocab_size: number of token ids that the loss and the logits know
    hidden_size: width of the residual stream
    intermediate_size: width of the SwiGLU MLP
    num_layers: number of decoder layers
    num_heads: query heads
    num_kv_heads: key and value heads; divides num_heads
    head_dim: channels per head; None is hidden_size / num_heads
    max_seq_len: longest sequence, in tokens, that the model is meant for; generation keeps at most this much context
    rope_theta: base of the rotary frequencies
    rope_scaling: Llama 3 stretch of the rotary frequencies; None is off
    rms_norm_eps: added to the mean square in every RMSNorm
    qkv_bias: biases on q_proj, k_proj, v_proj (Qwen2)
    qk_norm: RMSNorm on each query and key head before RoPE (Qwen3)
    tie_embeddings: lm_head.weight is embed_tokens.weight
    vocab_multiple: the embedding and lm_head get rows up to the next multiple of this; the loss and the logits leave
        the extra ones out
    init_std: standard deviation of the initial weights
    init_from: Hugging Face folder to start from instead of random weights, in BF16, FP16, FP32 or codes with a scale
        for each block; its shape must be this one
    activations: dtype of the linears' inputs and of attention: bfloat16 or float32; auto is float32 where the recipe is
        all FP32, otherwise bfloat16
    attention: dtype of queries, keys and values: bfloat16, float32, or auto for that of activations
    residual: dtype of the residual stream: float32 or bfloat16
    """

    name: str = "custom"
    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int | None = None
    max_seq_len: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    vocab_multiple: int = 1
    init_std: float = 0.02
    init_from: str | None = None
    activations: str = "auto"
    attention: str = "auto"
    residual: str = "float32"

    @property
    def has_shape(self) -> bool:
        """False while no size is given: a default config, or one whose shape is still to be read from init_from."""
        return any(getattr(self, name) for name in SIZES)

    @property
    def activations_dtype(self) -> torch.dtype:
        """Dtype of the linears' inputs."""
        return DTYPES[self.activations]

    @property
    def attention_dtype(self) -> torch.dtype:
        """Dtype of queries, keys and values."""
        return self.activations_dtype if self.attention == "auto" else DTYPES[self.attention]

    @property
    def residual_dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return DTYPES[self.residual]

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of lm_head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def kv_size(self) -> int:
        """Outputs of k_proj and of v_proj."""
        return self.num_kv_heads * (self.head_dim or 0)

    @property
    def q_size(self) -> int:
        """Outputs of q_proj, inputs of o_proj."""
        return self.num_heads * (self.head_dim or 0)

    def __post_init__(self) -> None:
        _check_choice("activations", self.activations, ACTIVATIONS)
        _check_choice("attention", self.attention, ACTIVATIONS)
        _check_choice("residual", self.residual, RESIDUALS)
        if not self.has_shape:
            return
        for name in (*SIZES, "num_kv_heads", "max_seq_len", "vocab_multiple"):
            if getattr(self, name) < 1 and self.init_from is not None:
                given = next(size for size in SIZES if getattr(self, size))
                raise ConfigError(
                    f"model.{given} is given beside model.init_from; needs all sizes or, so that the folder's "
                    f"config.json says them, none. Leave model.{given} out."
                )
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"model.{name} is {getattr(self, name)}; needs at least 1. Choose a preset (model=quickstart) or "
                    "give every size."
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads is {self.num_kv_heads}; needs a divisor of model.num_heads={self.num_heads}."
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"model.hidden_size is {self.hidden_size}; needs a multiple of model.num_heads={self.num_heads}, "
                    "or set model.head_dim."
                )
            self.head_dim = self.hidden_size // self.num_heads
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim is {self.head_dim}; needs an even number, because RoPE rotates pairs of channels. "
                "64 and 128 are usual."
            )
        for name in ("rope_theta", "rms_norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; needs a finite number above 0.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"model.{name} is {value!r}; needs one of {', '.join(choices)}.")
