"""Which modules are known to be an RMSNorm before linears, a SwiGLU, or a rotary embedding: by their class's full name.

By name, because Hugging Face's classes can declare nothing to us and are not to be imported; a class of another name,
a subclass too, may compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

NORM_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")


@dataclass(frozen=True, slots=True)
class NormLayout:
    """An RMSNorm with an FP32 `weight`.

    Args:
        eps: attribute that holds what is added to the mean square.
        rounds_early: it rounds to the dtype of its input before it multiplies by the weight.
        adds: it takes a branch to add to its input, and gives the sum too.
    """

    eps: str
    rounds_early: bool
    adds: bool = False


def _transformers(part: str) -> list[str]:
    families = ("Llama", "Mistral", "Qwen2", "Qwen3")
    return [f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}{part}" for name in families]


NORMS = {
    "fp8train.models.norm.RMSNorm": NormLayout("eps", rounds_early=False),
    "fp8train.models.norm.AddRMSNorm": NormLayout("eps", rounds_early=False, adds=True),
    **dict.fromkeys(_transformers("RMSNorm"), NormLayout("variance_epsilon", rounds_early=True)),
}
MLPS = ("fp8train.models.decoder.MLP", *_transformers("MLP"))
ROPES = ("fp8train.models.attention.Rope",)
LAYERS = ("fp8train.models.decoder.DecoderLayer", *_transformers("DecoderLayer"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer:
    """A module of a model whose result only linears read.

    Args:
        fqn: module path.
        linears: module paths of the linears that it works with: the readers of a norm; gate, up and down of an MLP.
        norm: how it is laid out, if it is a norm; None for an MLP.
    """

    fqn: str
    linears: tuple[str, ...]
    norm: NormLayout | None


def full_name(module: nn.Module) -> str:
    """Where the class of a module is defined, e.g. "fp8train.models.norm.RMSNorm"."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_producers(model: nn.Module) -> Iterator[Producer]:
    """The norms and MLPs of a model that are of a known class, in a layer of a known class; each path once."""
    for prefix, module in model.named_modules():
        start, name = f"{prefix}." if prefix else "", full_name(module)
        if name in LAYERS:
            for norm, readers in NORM_READERS.items():
                layout = NORMS.get(full_name(getattr(module, norm)))
                if layout is not None:
                    yield Producer(fqn=start + norm, linears=tuple(start + reader for reader in readers), norm=layout)
        elif name in MLPS and full_name(getattr(module, "act_fn", nn.SiLU())) in SILU:
            yield Producer(fqn=prefix, linears=tuple(start + linear for linear in MLP_LINEARS), norm=None)
