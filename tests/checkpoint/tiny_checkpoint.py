"""Checkpoints of a few hundred numbers: a model, its training, saving it, and ways of damaging what was saved."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fp8train.checkpoint import Retention, TrainingState, content_of, write_checkpoint
from fp8train.checkpoint.random_state import random_state
from fp8train.config import RunConfig, config_to_dict
from fp8train.optim import OptimConfig, build_optimizer


class Tiny(nn.Module):
    """Embedding with a tied head, dropout, a norm: what a checkpoint has to get right in a few hundred numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.proj = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.dropout(self.proj(self.embed_tokens(tokens)))))


def start(moments="fp32"):
    """The model and its optimizer before the first step, the same every time."""
    torch.manual_seed(0)
    model = Tiny()
    return model, build_optimizer(model, OptimConfig(lr=1e-2), moments)


def train(model, optimizer, steps):
    """Steps on tokens from the generators of torch, NumPy and Python, so that all three count."""
    losses = []
    for _ in range(steps):
        tokens = (torch.randint(0, 11, (4, 3)) + int(np.random.randint(11)) + random.randrange(11)) % 11  # noqa: NPY002
        loss = model(tokens).logsumexp(-1).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def training_state(**changes):
    """State of a run of 10 steps in BF16; `changes` replace its fields."""
    values = {
        "config": config_to_dict(RunConfig(steps=10, run_dir="run")),
        "recipe_document": {"version": 1, "rules": [{"match": "*", "use": "bf16"}]},
        "recipe_text": "version: 1\n",
        "recipe_hash": "abc",
        "random_states": [random_state()],
    }
    return TrainingState(**{**values, **changes})


def save_checkpoint(run_dir, step, model, optimizer, state, **options):
    """write_checkpoint of what a model and an optimizer hold; returns the folder."""
    return write_checkpoint(run_dir, step, content_of(model, optimizer), state, Retention(**options))


def save(run_dir, step, moments="fp32", **options):
    """Save as `step` what one step of training made; returns the folder."""
    model, optimizer = start(moments)
    train(model, optimizer, 1)
    return save_checkpoint(run_dir, step, model, optimizer, training_state(), **options)


def saved_steps(run_dir):
    """Steps of the checkpoints in a run folder, ascending."""
    return sorted(int(path.name.removeprefix("step_")) for path in (Path(run_dir) / "checkpoints").iterdir())


def _flip_bit(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "weights_changed": lambda path: _flip_bit(path / "model.safetensors"),
    "moments_changed": lambda path: _flip_bit(path / "optimizer.safetensors"),
    "state_changed": lambda path: _flip_bit(path / "state.json", 40),
    "weights_cut_off": lambda path: os.truncate(path / "model.safetensors", 100),
    "weights_empty": lambda path: os.truncate(path / "model.safetensors", 0),
    "weights_missing": lambda path: (path / "model.safetensors").unlink(),
    "marker_missing": lambda path: (path / "COMPLETE").unlink(),
    "marker_cut_off": lambda path: os.truncate(path / "COMPLETE", 30),
    "marker_not_text": lambda path: (path / "COMPLETE").write_bytes(b"\xff\xfe\x00"),
}
