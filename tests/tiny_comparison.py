"""A comparison whose arms take seconds: two layers of width 64."""

from __future__ import annotations

from pathlib import Path

from fp8train.config import RunConfig, load_config

TINY = [
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "seq_len=64",
    "global_batch_tokens=256",
    "data.eval_windows=4",
]


def configuration(run_dir: Path, *overrides: str) -> RunConfig:
    """Configuration of `fp8train compare` for 40 steps of it."""
    return load_config([*TINY, "steps=40", f"run_dir={run_dir}", *overrides], "compare")
