"""config.json of a Hugging Face Llama, Qwen2 or Qwen3 folder, to and from ModelConfig."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from fp8train.errors import CheckpointError, ConfigError
from fp8train.models.config import ModelConfig, RopeScaling

ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "qkv_bias",
    "qk_norm",
    "tie_embeddings",
)
"""Fields of ModelConfig that a folder fixes: with another value its weights would mean another function."""

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A model family of Hugging Face: class name in config.json and what sets it apart from Llama."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True),  # Qwen2.5 is qwen2
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True),
}


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """The parsed config.json of a folder.

    Raises:
        CheckpointError: no such folder or file, or it is not a JSON object.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: there is no config.json; needs a Hugging Face model folder on this machine. Correct the "
            "path."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({error}); needs the config.json of a model. Fetch the folder again."
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a {type(document).__name__}; needs an object. Fetch the folder again.")
    return document


def config_from_hf(directory: str | Path) -> ModelConfig:
    """ModelConfig of a Hugging Face Llama, Qwen2, Qwen2.5 or Qwen3 folder.

    Raises:
        CheckpointError: no readable config.json.
        ConfigError: another architecture, or a feature that Decoder does not have; the message names it.
    """
    document = read_config_json(directory)
    who = f"{Path(directory) / 'config.json'}"
    model_type = document.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        names = document.get("architectures") or [model_type]
        name = names[0] if isinstance(names, list) else names
        raise ConfigError(
            f"{who}: architecture {name!r}; needs one of {', '.join(f.architecture for f in FAMILIES.values())}. "
            "Take another folder."
        )
    _refuse_other_features(document, who)
    theta, scaling = _rope(document, who)
    heads = _required(document, "num_attention_heads", who)
    qwen3_head_dim = 128 if model_type == "qwen3" else None  # what Hugging Face assumes where config.json has none
    return ModelConfig(
        name=Path(directory).resolve().name,
        vocab_size=_required(document, "vocab_size", who),
        hidden_size=_required(document, "hidden_size", who),
        intermediate_size=_required(document, "intermediate_size", who),
        num_layers=_required(document, "num_hidden_layers", who),
        num_heads=heads,
        num_kv_heads=heads
        if model_type == "llama" and not document.get("num_key_value_heads")
        else _required(document, "num_key_value_heads", who),
        head_dim=_required(document, "head_dim", who) if document.get("head_dim") else qwen3_head_dim,
        max_seq_len=_required(document, "max_position_embeddings", who),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_number(document, "rms_norm_eps", 1e-6, who),
        qkv_bias=FAMILIES[model_type].qkv_bias,
        qk_norm=FAMILIES[model_type].qk_norm,
        tie_embeddings=_typed(document, "tie_word_embeddings", bool, False, who),
        init_std=_number(document, "initializer_range", 0.02, who),
    )


def check_same_architecture(config: ModelConfig, directory: str | Path) -> None:
    """Raise ConfigError unless the weights of a Hugging Face folder mean the same function in a model of `config`."""
    found = config_from_hf(directory)
    for field in ARCHITECTURE:
        ours, theirs = getattr(config, field), getattr(found, field)
        if ours != theirs:
            raise ConfigError(
                f"model.{field} is {ours}; the folder {directory} has {theirs}. Choose the preset of that model, or "
                "model=hf, which takes the shape "
                "from the folder."
            )


def resolve_config(config: ModelConfig) -> ModelConfig:
    """The config with the shape of init_from, where it names a folder and gives no sizes itself.

    Raises:
        ConfigError: config gives a size, or any other field that the folder fixes, with another value.
    """
    if config.init_from is None:
        return config
    if config.has_shape:
        check_same_architecture(config, config.init_from)
        return config
    found = config_from_hf(config.init_from)
    defaults = ModelConfig()
    for field in ARCHITECTURE:
        ours, theirs = getattr(config, field), getattr(found, field)
        if ours not in (getattr(defaults, field), theirs):
            raise ConfigError(
                f"model.{field} is {ours}; the folder {config.init_from} has {theirs}. Leave model.{field} out."
            )
    shape = {field: getattr(found, field) for field in ARCHITECTURE}
    return dataclasses.replace(config, **shape, name=found.name, max_seq_len=config.max_seq_len or found.max_seq_len)


def config_to_hf(config: ModelConfig, dtype: str, token_ids: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a model, as transformers 4 and 5 read it.

    Args:
        config: shape of the model.
        dtype: of the saved weights, "bfloat16" or "float32".
        token_ids: bos_token_id, eos_token_id, pad_token_id; null where left out.

    Raises:
        ConfigError: no family has this combination of qkv_bias and qk_norm.
    """
    wanted = (config.qkv_bias, config.qk_norm)
    families = [name for name, family in FAMILIES.items() if (family.qkv_bias, family.qk_norm) == wanted]
    if not families:
        raise ConfigError(
            f"model {config.name}: qkv_bias={config.qkv_bias} with qk_norm={config.qk_norm}; needs what a Llama "
            "(neither), Qwen2 (qkv_bias) or Qwen3 (qk_norm) has. Such a model has no Hugging Face folder."
        )
    model_type = families[0]
    family = FAMILIES[model_type]
    document = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if config.rope_scaling is not None:
        document["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    if not family.qkv_bias:
        document["attention_bias"] = False
    # written even when unknown: transformers would assume ids 1 and 2 for a Llama
    return document | {name: (token_ids or {}).get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _required(document: Mapping[str, Any], key: str, who: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{who}: {key} is {value!r}; needs a whole number. Fetch the folder again.")
    return value


def _number(document: Mapping[str, Any], key: str, default: float, who: str) -> float:
    value = document.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{who}: {key} is {value!r}; needs a number. Fetch the folder again.")
    return float(value)


def _typed(document: Mapping[str, Any], key: str, kind: type[T], default: T, who: str) -> T:
    """An entry of that type; the default where it is left out or null."""
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ConfigError(f"{who}: {key} is {value!r}; needs a {kind.__name__}. Fetch the folder again.")
    return value


def _rope_entry(document: Mapping[str, Any], who: str) -> Mapping[str, Any]:
    """What the folder says of rotary embeddings: rope_parameters (transformers 5) or rope_scaling (4)."""
    new, old = (_typed(document, key, dict, {}, who) for key in ("rope_parameters", "rope_scaling"))
    merged = dict(new) | {key: old[key] for key in old if key != "type"}
    if new and old and (merged != dict(new) or old.get("type", new.get("rope_type")) != new.get("rope_type")):
        raise ConfigError(
            f"{who}: rope_parameters is {new} and rope_scaling is {old}; needs one of the two, since programs differ "
            "in which they read. Delete the one that does not hold."
        )
    return new or old


def _refuse_other_features(document: Mapping[str, Any], who: str) -> None:
    rope = _rope_entry(document, who)
    layer_types = _typed(document, "layer_types", list, ["full_attention"], who)
    wanted = {
        "hidden_act": document.get("hidden_act", "silu") == "silu",
        "attention_bias": not document.get("attention_bias", False),
        "mlp_bias": not document.get("mlp_bias", False),
        "use_sliding_window": not document.get("use_sliding_window", False),
        "layer_types": all(kind == "full_attention" for kind in layer_types),
        "partial_rotary_factor": (document.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0)
        == 1.0,
    }
    for key, met in wanted.items():
        if not met:
            value = document.get(key, rope.get(key))
            raise ConfigError(
                f"{who}: {key} is {value!r}; the decoder here has silu, no biases on o_proj and the MLP, full "
                "attention and full rotary heads. Take another model."
            )


def _rope(document: Mapping[str, Any], who: str) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling, from rope_parameters (transformers 5) or rope_theta and rope_scaling (4)."""
    parameters = _rope_entry(document, who)
    theta = _number(parameters if "rope_theta" in parameters else document, "rope_theta", 10000.0, who)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        remedy = "Take another model."
        if kind == "dynamic":
            remedy += (
                " Within the original length it changes nothing: remove the entry if you train no longer sequences."
            )
        elif kind in ("linear", "yarn"):
            remedy += (
                " Remove the entry only if it was added for longer inference: where the weights were trained with it, "
                "that makes another model at every length."
            )
        raise ConfigError(f"{who}: rope type {kind!r}; needs default or llama3. {remedy}")
    if lacking := [key for key in LLAMA3_KEYS if key not in parameters]:
        raise ConfigError(
            f"{who}: rope scaling llama3 lacks {', '.join(lacking)}; needs {', '.join(LLAMA3_KEYS)}. Fetch the folder "
            "again."
        )
    factor, low, high = (_number(parameters, key, 0.0, who) for key in LLAMA3_KEYS[:3])
    return theta, RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high,
        original_max_seq_len=_required(parameters, LLAMA3_KEYS[3], who),
    )  # fmt: skip
