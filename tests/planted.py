"""A model whose own text it predicts, with outlier channels in two places that BF16 does not mind and FP8 does."""

from __future__ import annotations

import torch

from fp8train.convert import convert_model
from fp8train.data import Batch
from fp8train.models import Decoder, ModelConfig, build_model, initialize
from fp8train.nn.weights import evaluation_precision
from fp8train.quant.formats import BF16
from fp8train.recipe import Recipe

LAYERS = 4
PLANTED = {
    *(f"layers.1.self_attn.{name}_proj" for name in "qkv"),
    *(f"layers.2.mlp.{name}_proj" for name in ("gate", "up")),
}
OUTLIER = 2.0**18  # its neighbours in a block of E4M3 become zero


def planted_model(recipe: Recipe | str) -> Decoder:
    """Converted; the same weights for every recipe."""
    config = ModelConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_layers=LAYERS, num_heads=2, num_kv_heads=2,
        max_seq_len=64, activations="bfloat16",
    )  # fmt: skip
    model = build_model(config)
    initialize(model, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(5 if "lm_head" in name else 3)  # so that the layers say something
        # one channel of a norm is larger and what reads it smaller, by a power of two: the same function
        for norm, parent, readers in (
            (model.layers[1].input_layernorm, model.layers[1].self_attn, ("q_proj", "k_proj", "v_proj")),
            (model.layers[2].post_attention_layernorm, model.layers[2].mlp, ("gate_proj", "up_proj")),
        ):
            norm.weight[9] *= OUTLIER
            for reader in readers:
                getattr(parent, reader).weight[:, 9] /= OUTLIER
    convert_model(model, recipe)
    return model


def own_text(model: Decoder, windows: int, seed: int) -> list[Batch]:
    """Random tokens, with targets drawn from what the model predicts in BF16: any change of it raises the loss."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    with torch.no_grad(), evaluation_precision(model, BF16):
        for number in range(windows):
            tokens = torch.randint(64, (1, 64), generator=generator)
            chances = model(tokens)[0].float().softmax(-1)
            targets = torch.multinomial(chances, 1, generator=generator).T.contiguous()
            batches.append(Batch(tokens=tokens, targets=targets, document_ids=None, sample_ids=[number]))
    return batches
