"""A Llama-style decoder in plain PyTorch; conversion replaces linears and, where kernels exist, norms, MLPs, RoPE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8train.errors import ConfigError
from fp8train.models.attention import Attention, document_mask, rope_tables
from fp8train.models.config import ModelConfig
from fp8train.models.counting import count_parameters
from fp8train.models.loss import LOGITS_PER_CHUNK, cross_entropy_sum
from fp8train.models.norm import AddRMSNorm, RMSNorm
from fp8train.models.recompute import CHOICES, run_layer

MOST_PARAMETERS = 10**13


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": torch.float32}
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, **options)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, **options)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x keeps the dtype of the residual stream."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.activations = config.activations_dtype
        self.input_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps, device=device)
        self.self_attn = Attention(config, device)
        self.post_attention_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps, device=device)
        self.mlp = MLP(config, device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """One layer; shapes as in Attention.forward."""
        x, normed = self.input_layernorm(x, None, self.activations)
        x, normed = self.post_attention_layernorm(x, self.self_attn(normed, cos, sin, mask), self.activations)
        return (x + self.mlp(normed)).to(x.dtype)


class Decoder(nn.Module):
    """Decoder-only language model with the module names of Hugging Face's Llama, less the prefix `model.`.

    Parameters are FP32. Norms, RoPE and the loss compute in FP32, linears and attention read config.activations. With
    activations=bfloat16 the linears must be converted (fp8train.convert_model): nn.Linear itself wants its input in the
    dtype of its weight.

    Attributes:
        keep_high_precision: modules that a recipe leaves out of FP8 unless one of its rules names them.
        checkpointing: "none", "selective" or "full" activation checkpointing of every layer; see models/recompute.py.
        logits_per_chunk: number of logits that the loss holds at once.
    """

    keep_high_precision = ("lm_head",)

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        if not config.has_shape:
            raise ConfigError(
                f"model {config.name}: no size is given; needs all of them. Choose a preset (model=quickstart), or "
                "give model=hf "
                "model.init_from=DIR and pass the config through fp8train.models.resolve_config."
            )
        if count_parameters(config) > MOST_PARAMETERS:  # laying it out would take hours and all memory
            raise ConfigError(
                f"model {config.name}: its sizes come to {count_parameters(config):.1e} parameters; needs at most "
                f"{MOST_PARAMETERS:.0e}. Correct them, or the config.json that they are from."
            )
        self.config = config
        self.logits_per_chunk = LOGITS_PER_CHUNK
        self._checkpointing = "none"
        self.embed_tokens = nn.Embedding(
            config.padded_vocab_size, config.hidden_size, device=device, dtype=torch.float32
        )
        self.layers = nn.ModuleList(DecoderLayer(config, device) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device)
        self.lm_head = nn.Linear(
            config.hidden_size, config.padded_vocab_size, bias=False, device=device, dtype=torch.float32
        )
        self.tie_weights()

    @property
    def checkpointing(self) -> str:
        """Activation checkpointing of every layer: none, selective or full."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, choice: str) -> None:
        if choice not in CHOICES:
            raise ConfigError(f"activation_checkpointing is {choice!r}; needs one of {', '.join(CHOICES)}.")
        self._checkpointing = choice

    def tie_weights(self) -> None:
        """Make lm_head.weight the Parameter of embed_tokens, if the config ties them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        super()._apply(fn, recurse)
        self.tie_weights()  # to_empty() gives each module a Parameter of its own
        return self

    def forward(self, tokens: Tensor, targets: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Logits, or the summed loss when targets are given.

        Args:
            tokens: [B, T] int64.
            targets: [B, T] int64, the token after each position; -100 leaves a position out of the loss.
            document_ids: [B, T] integers; a token attends only to tokens with its own id. None is plain causal
                attention.

        Returns:
            Tensor: [B, T, vocab_size] in config.activations; with targets the fp32 scalar sum of cross-entropies.
        """
        hidden = self.hidden_states(tokens, document_ids)
        if targets is None:
            return self.lm_head(hidden)[..., : self.config.vocab_size]
        return cross_entropy_sum(
            hidden.flatten(0, 1), targets.flatten(), self.lm_head, self.config.vocab_size, self.logits_per_chunk
        )

    def hidden_states(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """What lm_head reads: the last layer's output after the final norm, [B, T, hidden] in config.activations."""
        cos, sin = rope_tables(self.config, tokens.shape[1], tokens.device)
        mask = None if document_ids is None else document_mask(document_ids, self.config.attention_dtype)
        x = self.embed_tokens(tokens).to(self.config.residual_dtype)
        for layer in self.layers:
            x = run_layer(self._checkpointing, layer, x, cos, sin, mask)
        return self.norm(x, self.config.activations_dtype)

    def extra_repr(self) -> str:
        dtypes = f"activations={self.config.activations}, residual={self.config.residual}"
        return f"{self.config.name}, {dtypes}, checkpointing={self.checkpointing}"


def build_model(config: ModelConfig, device: torch.device | str = "cpu") -> Decoder:
    """Lay out the decoder of `config`; its weights are not initialised (see initialize, load_hf).

    Args:
        config: shape and dtypes.
        device: "meta" lays out a model that this machine could not hold; to_empty(device=...) and initialize give it
            weights.
    """
    return Decoder(config, device)
