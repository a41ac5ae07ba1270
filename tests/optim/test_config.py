"""OptimConfig: what it refuses, and the presets in configs/optim."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from fp8train._layout import folder
from fp8train.errors import ConfigError
from fp8train.optim.config import OptimConfig

BAD = {
    "lr": 0.0, "eps": 0.0, "betas": (0.9, 1.0), "weight_decay": -0.1, "moments": "fp16", "schedule": "cosin",
    "warmup_steps": -1, "warmup_fraction": 1.0, "min_lr_ratio": 1.5, "decay_steps": -1, "decay_fraction": 1.1,
    "decay_shape": "sqrt", "clip_grad_norm": 0.0, "max_nonfinite_steps": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_value_out_of_range_names_the_key_and_a_remedy(name):
    with pytest.raises(ConfigError, match=rf"^optim\.{name}: is .*; needs .* Set optim\.{name}="):
        OptimConfig(**{name: BAD[name]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "clip_grad_norm", "warmup_fraction", "min_lr_ratio"])
def test_non_finite_value_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        OptimConfig(**{name: value})


@pytest.mark.parametrize("path", sorted((folder("configs") / "optim").glob("*.yaml")), ids=lambda path: path.stem)
def test_preset_merges_into_the_dataclass(path):
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OptimConfig), OmegaConf.load(path)))
    assert isinstance(config, OptimConfig)
    assert config.betas == (0.9, 0.95)
    assert OptimConfig(**OmegaConf.to_container(OmegaConf.load(path))) == config
