"""A run that takes a second: one layer of width 128 on generated text."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fp8train.config import RunConfig, load_config
from fp8train.distributed import World
from fp8train.metrics import METRICS_FILE
from fp8train.trainer import Trainer
from fp8train.trainer.console import Console
from fp8train.trainer.run_folder import RunResult

WORDS = ("alpha", "beta", "gamma", "delta", "the", "of", "and", "run", "loss", "step", "scale", "block", "row", "amax")


def tiny_text(folder: Path) -> Path:
    """A file of generated lines, the same every time."""
    path = folder / "text.txt"
    if not path.exists():
        source = random.Random(0)
        lines = (" ".join(source.choices(WORDS, k=source.randint(4, 12))) for _ in range(1500))
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


def tiny_arguments(folder: Path, *overrides: str, run: str = "run") -> list[str]:
    """Command line of a run below `folder`; 8 sequences of 64 tokens a step."""
    return [
        "experiment=null", "model.num_layers=1", "model.hidden_size=128", "model.intermediate_size=256",
        "model.num_heads=2", "model.num_kv_heads=2", "model.max_seq_len=64", "seq_len=64", "global_batch_tokens=512",
        "data=text", f"data.path={tiny_text(folder)}", "data.document_bytes=1000", "data.eval_windows=8",
        "optim.lr=3e-3", "steps=6", "log.print_every=1", "log.skip_steps=1", f"run_dir={folder / run}", *overrides,
    ]  # fmt: skip


def tiny_config(folder: Path, *overrides: str, run: str = "run") -> RunConfig:
    """Configuration of tiny_arguments."""
    return load_config(tiny_arguments(folder, *overrides, run=run))


def tiny_train(folder: Path, *overrides: str, run: str = "run", console: Console | None = None) -> RunResult:
    """Train in this process, silently unless a console is given."""
    return Trainer(tiny_config(folder, *overrides, run=run), World(), console or Console(enabled=False)).run()


def padded_metrics(folder: Path) -> Path:
    """metrics.jsonl of a run of three steps, larger than whatever else is written before the next checkpoint."""
    tiny_train(folder, "steps=3")
    path = folder / "run" / METRICS_FILE
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 1, "padding": "x" * 200_000}) + "\n")
    return path
