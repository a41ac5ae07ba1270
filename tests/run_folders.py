"""Synthetic run folders: the files that a finished run leaves, with known numbers in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fp8train.report.run_record import Arms
from fp8train.report.verdict import make_verdict

FACTS = {
    "model_hash": "m" * 16,
    "tokenizer_hash": "t" * 16,
    "data_hash": "d" * 16,
    "stream_hash": "s" * 16,
    "eval_hash": "e" * 16,
    "init_hash": "i" * 16,
}
ENVIRONMENT = {
    "date": "2025-11-20",
    "python": "3.12.3",
    "torch": "2.13.0",
    "device": {"name": "CPU, 2 cores", "memory_bytes": 25_769_803_776},
}
TOKENS_PER_STEP = 4096
LINEARS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (704, 256),
    "mlp.up_proj": (704, 256),
    "mlp.down_proj": (256, 704),
}


def verdict_of(arms: Arms, **given: Any) -> dict[str, Any]:
    """Of arms whose baseline is bf16, by the margin that a comparison has unless told otherwise."""
    return make_verdict(arms, baseline="bf16", margin_percent=0.25, **given)


def words_of(verdict: Mapping[str, Any]) -> str:
    """All that a verdict says in words: headline, numbers, caveats."""
    return " ".join([verdict["sentence"], *verdict["numbers"], *verdict["caveats"]])


def write_run(
    folder: Path,
    *,
    recipe: str = "bf16",
    losses: np.ndarray | None = None,
    eval_loss: float = 2.25,
    tokens_per_second: float = 40_000.0,
    speed_spread: float = 0.02,
    memory_bytes: float = 1.4e9,
    coverage: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    seed: int = 1,
    sources: Mapping[str, float] | None = None,
    **facts: Any,
) -> Path:
    """Write a finished run of len(losses) steps (default 40); `facts` go into result.json over FACTS.

    Args:
        speed_spread: standard deviation of the logarithm of a step's speed.
        sources: of a mix, the held-out loss of each; not in the first evaluation.
    """
    folder.mkdir(parents=True)
    losses = 2.2 + 3.3 * np.exp(-np.arange(40) / 12) if losses is None else losses
    rows = _metrics(recipe, losses, eval_loss, tokens_per_second, speed_spread, seed)
    rows[-1] |= {f"eval_loss/{name}": loss for name, loss in (sources or {}).items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = {
        "finished": True,
        "steps": len(losses),
        "tokens_seen": len(losses) * TOKENS_PER_STEP,
        "parameters": 3_468_544,
        "device": "cpu",
        "train_seconds": len(losses) * TOKENS_PER_STEP / tokens_per_second,
        "peak_memory_bytes": memory_bytes,
        **FACTS,
        **facts,
    }
    config = {
        "recipe": recipe,
        "steps": len(losses),
        "seed": seed,
        "run_dir": str(folder),
        "model": {"name": "quickstart"},
        "optim": {"lr": 1e-3},
    }
    coverage = make_coverage(recipe) if coverage is None else coverage
    for name, content in (("result", result), ("environment", environment or ENVIRONMENT), ("coverage", coverage)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    precisions = "precisions: {placebo: {noise: 0.0265}}\n" if recipe == "placebo" else ""
    rules = f"version: 1\n{precisions}rules:\n  - {{match: '*', use: {recipe}}}\n"
    (folder / "recipe.yaml").write_text(rules, encoding="utf-8")
    return folder


def _metrics(
    recipe: str, losses: np.ndarray, eval_loss: float, tokens_per_second: float, speed_spread: float, seed: int
) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: every step, and an evaluation half-way, 0.3 above eval_loss, and at the end."""
    speeds = tokens_per_second * np.exp(speed_spread * np.random.default_rng(seed).standard_normal(len(losses)))
    speeds[0] *= 0.4
    rows: list[dict[str, Any]] = []
    for step, (loss, speed) in enumerate(zip(losses.tolist(), speeds.tolist(), strict=True), start=1):
        good = math.isfinite(loss)
        row = {"step": step, "loss": loss if good else None, "lr": 1e-3, "grad_norm": 1.0 if good else None}
        row |= {
            "tokens_seen": step * TOKENS_PER_STEP,
            "tokens_per_second": speed,
            "step_seconds": TOKENS_PER_STEP / speed,
        }
        rows.append(row if good else row | {"nonfinite": True})
        if step in (len(losses) // 2, len(losses)):
            value = eval_loss + (0.3 if step < len(losses) else 0.0)
            if math.isnan(value):
                rows.append({"step": step, "eval_loss": None, "eval_loss_bf16": None, "nonfinite": True})
                continue
            high = value if recipe == "bf16" else value - 0.001
            bits = {"bits_per_byte": value / math.log(2), "bits_per_byte_bf16": high / math.log(2)}
            rows.append({"step": step, "eval_loss": value, "eval_loss_bf16": high, **bits})
    return rows


def write_diverged_run(folder: Path, *, step: int = 17, reason: str = "loss is nan", **options: Any) -> Path:
    """Write a run that ended after ten steps, from that one on, whose loss was not finite; options of write_run."""
    losses = np.append(np.linspace(5.5, 3.0, step - 1), np.full(10, np.nan))
    diverged = {"step": step, "reason": reason}
    path = write_run(folder, losses=losses, finished=False, diverged=diverged, **{"stream_hash": "part"} | options)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "eval_loss" not in row or row["step"] < len(losses)]  # there is none at the end
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return path


def make_coverage(recipe: str, *, layers: int = 4, rows: int = 1000) -> dict[str, Any]:
    """Coverage of a small decoder: all FP8 but lm_head, or all BF16 for recipe bf16; the last layer's down_proj has
    its wgrad in BF16.
    """
    linears = []
    for layer in range(layers):
        for name, shape in LINEARS.items():
            odd = layer == layers - 1 and name == "mlp.down_proj"
            planned = {
                gemm: "bf16" if recipe in ("bf16", "placebo") or (odd and gemm == "wgrad") else "fp8"
                for gemm in ("fprop", "dgrad", "wgrad")
            }
            reason = "BF16 weight gradient of the last layer" if odd and recipe not in ("bf16", "placebo") else ""
            linears.append(_linear(f"layers.{layer}.{name}", shape, planned, rows, rule="*layers.*", reason=reason))
    planned = dict.fromkeys(("fprop", "dgrad", "wgrad"), "bf16")
    linears.append(
        _linear("lm_head", (256, 256), planned, rows, rule="*lm_head", reason="kept in high precision by the model")
    )
    fp8 = sum(_flops(linear, "fp8_rows") for linear in linears)
    total = fp8 + sum(_flops(linear, "other_rows") for linear in linears)
    return {"backend": "cpu", "recipe": recipe, "fp8_flops_share": fp8 / total, "linears": linears}


def _linear(
    fqn: str, shape: tuple[int, int], planned: Mapping[str, str], rows: int, *, rule: str, reason: str
) -> dict[str, Any]:
    gemms = {}
    for gemm, plan in planned.items():
        fp8, other = (rows, 0) if plan == "fp8" else (0, rows)
        gemms[gemm] = {
            "planned": plan,
            "fp8_calls": fp8 // 100,
            "other_calls": other // 100,
            "fp8_rows": fp8,
            "other_rows": other,
        }
    return {
        "fqn": fqn,
        "shape": list(shape),
        "precision": max(planned.values()),
        "rule": rule,
        "reason": reason,
        "gemms": gemms,
    }


def _flops(linear: Mapping[str, Any], key: str) -> float:
    return sum(2.0 * count[key] * linear["shape"][0] * linear["shape"][1] for count in linear["gemms"].values())
