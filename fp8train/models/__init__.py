"""A Llama-style decoder, its initial weights, and Hugging Face folders in and out."""

from __future__ import annotations

from fp8train.models.config import ModelConfig, RopeScaling
from fp8train.models.counting import count_parameters, flops_per_token
from fp8train.models.decoder import Decoder, build_model
from fp8train.models.hf import Packing, hf_name, hf_values, load_hf, save_hf
from fp8train.models.hf_config import config_from_hf, read_config_json, resolve_config
from fp8train.models.initialization import fill, initial_values, initialize

__all__ = [
    "Decoder",
    "ModelConfig",
    "Packing",
    "RopeScaling",
    "build_model",
    "config_from_hf",
    "count_parameters",
    "fill",
    "flops_per_token",
    "hf_name",
    "hf_values",
    "initial_values",
    "initialize",
    "load_hf",
    "read_config_json",
    "resolve_config",
    "save_hf",
]
