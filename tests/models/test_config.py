"""Presets are the published shapes; a shape that cannot be is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import yaml

from fp8train._layout import folder
from fp8train.arguments import structure
from fp8train.errors import ConfigError
from fp8train.models import Decoder, ModelConfig

PRESETS = sorted(path.stem for path in (folder("configs") / "model").glob("*.yaml") if path.stem != "hf")


def preset(name: str) -> ModelConfig:
    path = folder("configs") / "model" / f"{name}.yaml"
    return structure(ModelConfig, yaml.safe_load(path.read_text()), who=path.name)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_loads_under_its_own_name_and_suits_fp8_blocks(name):
    config = preset(name)
    assert config.name == name
    assert config.hidden_size % 128 == 0 and config.intermediate_size % 128 == 0 and config.head_dim % 64 == 0
    assert config.padded_vocab_size % 64 == 0


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama3_1b", (128256, 2048, 8192, 16, 32, 8, 64, 500000.0, 1e-5, False, True, 131072)),
        ("llama3_8b", (128256, 4096, 14336, 32, 32, 8, 128, 500000.0, 1e-5, False, False, 8192)),
        ("qwen25_1_5b", (151936, 1536, 8960, 28, 12, 2, 128, 1e6, 1e-6, True, True, 131072)),
        ("qwen25_7b", (152064, 3584, 18944, 28, 28, 4, 128, 1e6, 1e-6, True, False, 131072)),
    ],
)
def test_preset_is_what_was_published(name, published):
    c = preset(name)
    assert published == (
        c.vocab_size, c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim,
        c.rope_theta, c.rms_norm_eps, c.qkv_bias, c.tie_embeddings, c.max_seq_len,
    )  # fmt: skip
    assert not c.qk_norm and c.vocab_multiple == 1
    if name == "llama3_1b":
        assert dataclasses.astuple(c.rope_scaling) == (32.0, 1.0, 4.0, 8192)
    else:
        assert c.rope_scaling is None


def test_padded_vocabulary_is_the_next_multiple():
    assert preset("quickstart").padded_vocab_size == 320  # 257 ids in units of 64
    assert preset("llama_125m").padded_vocab_size == 50304  # 50257 ids in units of 128
    assert preset("llama3_8b").padded_vocab_size == 128256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads is 3; needs a divisor"),
        ({"hidden_size": 258, "head_dim": None}, "hidden_size is 258; needs a multiple"),
        ({"head_dim": 63}, "head_dim is 63; needs an even number"),
        ({"vocab_size": 0}, "vocab_size is 0; needs at least 1"),
        ({"activations": "float16"}, "activations is 'float16'; needs one of auto, bfloat16, float32"),
        ({"attention": "fp8"}, "attention is 'fp8'; needs one of auto, bfloat16, float32"),
        ({"residual": "auto"}, "residual is 'auto'; needs one of float32, bfloat16"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope_theta": math.inf}, "rope_theta is inf; needs a finite number above 0"),
        ({"vocab_size": 0, "init_from": "folder"}, "model.hidden_size is given beside model.init_from; .* Leave"),
        ({"rope_scaling": {"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "original_max_seq_len": 1}},
         "needs factor >= 1 and 0 < low < high"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_shape_that_cannot_be_is_refused(changes, message):
    values = yaml.safe_load((folder("configs") / "model" / "quickstart.yaml").read_text()) | changes
    with pytest.raises(ConfigError, match=message):
        structure(ModelConfig, values, who="test")


def test_config_without_sizes_is_no_model():
    assert not ModelConfig().has_shape
    with pytest.raises(ConfigError, match="Choose a preset"):
        Decoder(ModelConfig())
