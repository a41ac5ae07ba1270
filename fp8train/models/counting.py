"""Parameters and FLOPs of a decoder, from its config alone."""

from __future__ import annotations

from fp8train.models.config import ModelConfig


def linear_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied by: the linears of all layers and lm_head, without biases.

    L * (H*Q + 2*H*KV + Q*H + 3*H*I) + V*H, with Q = heads * head_dim, KV = kv_heads * head_dim.
    """
    hidden = config.hidden_size
    attention = 2 * hidden * config.q_size + 2 * hidden * config.kv_size
    mlp = 3 * hidden * config.intermediate_size
    return config.num_layers * (attention + mlp) + config.padded_vocab_size * hidden


def count_parameters(config: ModelConfig) -> int:
    """Trainable parameters of the model: linears, biases, norms and embedding; a tied embedding counts once.

    Returns:
        int: equals sum(p.numel() for p in build_model(config).parameters()).
    """
    norms = 2 * config.hidden_size
    if config.qk_norm:
        norms += 2 * (config.head_dim or 0)
    biases = config.q_size + 2 * config.kv_size if config.qkv_bias else 0
    embedding = 0 if config.tie_embeddings else config.padded_vocab_size * config.hidden_size
    return linear_parameters(config) + embedding + config.num_layers * (norms + biases) + config.hidden_size


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations that one training token costs, forward and backward.

    6 * N + 12 * L * Q * T: N counts the weights of the linears with lm_head (the embedding look-up and norms are free),
    Q = heads * head_dim. Attention counts the full T x T square, as MFU figures usually do, although the causal half
    suffices; recomputation counts nothing.

    Args:
        seq_len: tokens in a sequence, T.

    Source: PaLM (arXiv:2204.02311) appendix B.
    """
    return 6 * linear_parameters(config) + 12 * config.num_layers * config.q_size * seq_len
