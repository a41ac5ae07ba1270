"""Parameters and FLOPs against sums written out by hand from the published shapes."""

from __future__ import annotations

import dataclasses

import pytest

from fp8train.models import build_model, count_parameters, flops_per_token
from tests.models.test_config import PRESETS, preset

# embedding, then per layer: q, k, v, o, (biases), gate + up + down, two norms; then the final norm and lm_head unless
# tied
HAND_COUNTED = {
    "llama3_1b": 128256 * 2048
    + 16 * (2048 * 2048 + 2048 * 512 + 2048 * 512 + 2048 * 2048 + 3 * 2048 * 8192 + 2 * 2048)
    + 2048,
    "llama3_8b": 128256 * 4096
    + 32 * (4096 * 4096 + 4096 * 1024 + 4096 * 1024 + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096)
    + 4096
    + 128256 * 4096,
    "qwen25_1_5b": 151936 * 1536
    + 28 * (1536 * 1536 + 1536 * 256 + 1536 * 256 + 1536 * 1536 + 1536 + 256 + 256 + 3 * 1536 * 8960 + 2 * 1536)
    + 1536,
    "qwen25_7b": 152064 * 3584
    + 28 * (3584 * 3584 + 3584 * 512 + 3584 * 512 + 3584 * 3584 + 3584 + 512 + 512 + 3 * 3584 * 18944 + 2 * 3584)
    + 3584
    + 152064 * 3584,
    "quickstart": 320 * 256 + 4 * (4 * 256 * 256 + 3 * 256 * 768 + 2 * 256) + 256 + 320 * 256,
}
PUBLISHED = {
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "qwen25_1_5b": 1_543_714_304,
    "qwen25_7b": 7_615_616_512,
    "quickstart": 3_574_016,
}


@pytest.mark.parametrize("name", HAND_COUNTED)
def test_parameters_equal_the_hand_count(name):
    assert HAND_COUNTED[name] == PUBLISHED[name]
    assert count_parameters(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_model_on_meta_has_the_counted_parameters(name):
    config = preset(name)
    model = build_model(config, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config)


def test_qk_norm_and_odd_heads_are_counted():
    config = dataclasses.replace(preset("quickstart"), qk_norm=True, qkv_bias=True, head_dim=128, num_kv_heads=2)
    model = build_model(config, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config)


# 6 x (weights of the linears and lm_head) + 12 x layers x heads x head_dim x seq_len, worked out by hand
HAND_FLOPS = {
    # 8,030,261,248 - embedding 525,336,576 - norms 266,240
    "llama3_8b": (8192, 6 * 7_504_658_432 + 12 * 32 * 4096 * 8192),
    # 1,235,814,400 - norms 67,584; the tied matrix is lm_head
    "llama3_1b": (4096, 6 * 1_235_746_816 + 12 * 16 * 2048 * 4096),
    # 7,615,616,512 - embedding 544,997,376 - norms 204,288 - biases 129,024
    "qwen25_7b": (4096, 6 * 7_070_285_824 + 12 * 28 * 3584 * 4096),
    # 3,574,016 - embedding 81,920 - norms 2,304
    "quickstart": (256, 6 * 3_489_792 + 12 * 4 * 256 * 256),
}


@pytest.mark.parametrize("name", HAND_FLOPS)
def test_flops_equal_the_hand_count(name):
    seq_len, flops = HAND_FLOPS[name]
    assert flops_per_token(preset(name), seq_len) == flops
