"""An alarm demotes for what FP8 has done, and the linear that has done it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fp8train.data import Batch
from fp8train.metrics import read_metrics
from fp8train.nn.linear import Float8Linear
from fp8train.recipe import load_recipe
from fp8train.trainer import loop
from fp8train.trainer.alarm_watcher import AlarmWatcher
from fp8train.trainer.console import Console
from fp8train.trainer.suspect import OUTSIDE, Trace
from tests.tiny_run import tiny_train

LINEARS = [
    *(f"0.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")),
    *(f"1.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")),
    "lm_head",
]
TWO_LAYERS = ("model.num_layers=2", "data.holdout_fraction=0")
SPIKES = {"on": ["spike", "nonfinite"], "spike_nats": 0.8, "window": 4}


@pytest.mark.parametrize(
    ("broken", "culprit"),
    [
        ({"0.down_proj": "y", "1.q_proj": "x", "1.k_proj": "x", "1.v_proj": "x"}, "0.down_proj"),
        ({"1.q_proj": "x", "1.k_proj": "x"}, "0.down_proj"),
        ({"1.o_proj": "x"}, "1.v_proj"),
        ({"1.up_proj": "x"}, "1.o_proj"),
        ({"0.q_proj": "x"}, OUTSIDE),
        ({"lm_head": "y"}, "1.down_proj"),
        ({"0.o_proj": "w", "0.gate_proj": "x"}, OUTSIDE),
        ({"1.o_proj": "dy", "1.q_proj": "dy", "0.down_proj": "dy"}, "1.gate_proj"),
        ({"1.q_proj": "dy"}, "1.o_proj"),
        ({"1.down_proj": "dy"}, OUTSIDE),
        ({"0.up_proj": "dw"}, "0.up_proj"),
        ({"0.up_proj": "dw", "0.gate_proj": "dy"}, "0.up_proj"),
        ({}, None),
    ],
    ids=str,
)
def test_culprit_is_where_the_first_number_that_is_not_finite_was_made(broken: dict[str, str], culprit: str | None):
    """lm_head does not quantise: what it does is put down to the linear before it."""
    trace = Trace(order=LINEARS, finite={(fqn, operand): False for fqn, operand in broken.items()})
    found = trace.culprit(LINEARS[:-1])
    assert (None if found is None else found[1]) == culprit


def test_a_sum_over_ranks_says_less_than_what_a_rank_saw_itself() -> None:
    healthy = Trace(order=LINEARS, finite={(fqn, "dw"): False for fqn in LINEARS[:7]})
    broken = Trace(order=LINEARS, finite={("0.up_proj", "dy"): False} | healthy.finite)
    assert healthy.culprit(LINEARS, sums=True) == (2, "0.down_proj")
    assert broken.culprit(LINEARS, sums=True) == (1, "0.down_proj")
    assert healthy.culprit(LINEARS) == (1, "0.down_proj")


def test_weights_that_are_not_finite_are_taken_back_without_a_demotion(
    alarmed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step, done = loop.train_step, list[int]()

    def poisoned(model: Any, optimizer: Any, batches: list[Batch], *args: Any, **options: Any) -> Any:
        if batches[0].sample_ids[0] // 8 == 4 and not done:
            done.append(5)
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "up_proj" in name)[0, 0] = math.nan
        return step(model, optimizer, batches, *args, **options)

    monkeypatch.setattr(loop, "train_step", poisoned)
    (event,) = alarmed({"on": ["nonfinite"]}, "checkpoint.every=2")
    assert (event["event"], event["step"], event["returned_to"], event["demoted"]) == ("return", 5, 4, [])
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row and not row.get("skipped")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def alarmed(tmp_path: Path) -> Callable[..., Any]:
    """Trains under an alarm; gives the events."""

    def run(alarm: dict[str, Any], *overrides: str, warn: Callable[[str], None] = lambda text: None) -> list[dict]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(load_recipe("blockwise").document | {"alarm": alarm}))
        console = Console(enabled=False)
        console.warn = warn  # type: ignore[method-assign]
        tiny_train(tmp_path, f"recipe={recipe}", *TWO_LAYERS, *overrides, console=console)
        events = tmp_path / "run" / "events.jsonl"
        return [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []

    return run


@pytest.fixture
def broken_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From a step on, one linear adds infinity to what it gives, or to its gradient, while it is in FP8 (or always)."""
    now = {"step": 0}
    step = loop.train_step

    def counted(model: Any, optimizer: Any, batches: list[Batch], *args: Any, **options: Any) -> Any:
        now["step"] = batches[0].sample_ids[0] // 8 + 1
        return step(model, optimizer, batches, *args, **options)

    def install(name: str, first: int, *, backward: bool = False, always: bool = False, add: float = math.inf) -> None:
        honest, target = Float8Linear.forward, {}

        def forward(self: Float8Linear, x: Any) -> Tensor:
            y = honest(self, x)
            if self is not target["module"] or now["step"] < first or not (always or self.precision.any_fp8):
                return y
            return _Broken.apply(y) if backward else y + add

        def build(self: Any) -> None:
            built(self)
            target["module"] = self.model.get_submodule(name)

        built = loop.Trainer._build
        monkeypatch.setattr(loop.Trainer, "_build", build)
        monkeypatch.setattr(Float8Linear, "forward", forward)
        monkeypatch.setattr(loop, "train_step", counted)

    return install


class _Broken(torch.autograd.Function):
    """Nothing in forward; infinity in backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy + math.inf


def test_the_linear_that_gives_infinities_is_demoted_and_not_those_that_read_them(
    alarmed: Callable[..., Any], broken_at: Callable[..., None]
) -> None:
    broken_at("layers.0.mlp.down_proj", 4)
    (event,) = alarmed({"on": ["nonfinite"]}, "checkpoint.every=2", "fused=never")
    assert event["event"] == "demotion" and event["demoted"] == ["layers.0.mlp.down_proj"]
    assert (event["step"], event["returned_to"], event["worst"]["fqn"]) == (4, 2, "layers.0.mlp.down_proj")


def test_in_backward_it_is_the_last_one_whose_gradient_came_finite(
    alarmed: Callable[..., Any], broken_at: Callable[..., None]
) -> None:
    """What o_proj makes of a finite gradient is broken, and q, k and v read it."""
    broken_at("layers.1.self_attn.o_proj", 3, backward=True)
    (event,) = alarmed({"on": ["nonfinite"]}, "checkpoint.every=1", "steps=4", "fused=never")
    assert event["demoted"] == ["layers.1.self_attn.o_proj"]


def test_an_alarm_that_is_used_up_says_so(
    alarmed: Callable[..., Any], noise_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AlarmWatcher, "_innocent", lambda self, result: None)
    noise_at(7)
    warnings: list[str] = []
    events = alarmed(SPIKES | {"at_most": 1}, "steps=8", "checkpoint.every=6", warn=warnings.append)
    assert [event["event"] for event in events] == ["demotion", "spared"] and "used up" in events[1]["why"]
    assert any("at_most=1 demotions are used up; training goes on" in text for text in warnings)


def test_nothing_is_demoted_where_bf16_is_not_finite_either(
    alarmed: Callable[..., Any], broken_at: Callable[..., None], tmp_path: Path
) -> None:
    broken_at("layers.0.mlp.down_proj", 4, always=True)
    warnings: list[str] = []
    events = alarmed({"on": ["nonfinite"]}, "checkpoint.every=2", "log.every=50", warn=warnings.append)
    assert [event["event"] for event in events] == ["spared"] * 3, "steps 4, 5 and 6"
    assert all("BF16 is not finite either" in event["why"] for event in events)
    assert len([text for text in warnings if "not by FP8" in text]) == 1, "once in a window"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "alarm" in row] == [4, 5, 6]


@pytest.fixture
def noise_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """All targets of one step are drawn at random."""

    def install(step: int) -> None:
        from fp8train.data import Batcher

        honest = Batcher.batch_of

        def batch_of(self: Batcher, samples: Any, ids: list[int]) -> Batch:
            batch = honest(self, samples, ids)
            if ids[0] // 8 == step - 1:
                batch.targets[:] = torch.randint(
                    128, 256, batch.targets.shape, generator=torch.Generator().manual_seed(1)
                )
            return batch

        monkeypatch.setattr(Batcher, "batch_of", batch_of)

    return install


@pytest.mark.parametrize("barely", [False, True])
def test_a_batch_that_is_noise_demotes_nothing_and_undoes_nothing(
    barely: bool, alarmed: Callable[..., Any], noise_at: Callable[[int], None], tmp_path: Path
) -> None:
    """Nor where the loss is above the limit by less than what the step has learned of the noise itself."""
    noise_at(9)
    alarm = dict(SPIKES)
    if barely:
        (event,) = alarmed(alarm, "steps=11", "log.every=50")
        alarm["spike_nats"] = float(event["cause"].split(" is ")[1].split(" above")[0]) - 0.02
        shutil.rmtree(tmp_path / "run")
    (event,) = alarmed(alarm, "steps=11", "log.every=50")
    assert event["event"] == "spared" and event["step"] == 9 and "not by FP8: after the step it reads" in event["why"]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "alarm" in row] == [9], "written although no row is due"


def test_after_going_back_the_step_is_held_against_the_same_losses(
    alarmed: Callable[..., Any], noise_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each retry of a step that stays bad sounds the alarm again, however near the checkpoint is."""
    monkeypatch.setattr(AlarmWatcher, "_innocent", lambda self, result: None)
    noise_at(9)
    events = alarmed(SPIKES | {"at_most": 2}, "steps=9", "checkpoint.every=8")
    assert [(event["event"], event["step"], event.get("returned_to")) for event in events] == [
        ("demotion", 9, 8), ("demotion", 9, 8), ("spared", 9, None),
    ]  # fmt: skip


def test_fp8_that_raises_the_loss_is_demoted(alarmed: Callable[..., Any], broken_at: Callable[..., None]) -> None:
    broken_at("layers.1.mlp.down_proj", 9, add=30.0)
    events = alarmed(SPIKES | {"at_most": 1}, "steps=9", "checkpoint.every=8", "fused=never")
    assert events[0]["event"] == "demotion" and events[0]["step"] == 9
