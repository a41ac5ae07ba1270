"""Checkpoints: bit-for-bit resume, what is stored, which models and recipes are refused, retention."""

from __future__ import annotations

import gc
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fp8train.checkpoint import open_checkpoint
from fp8train.checkpoint.files import read_tensors
from fp8train.checkpoint.random_state import random_state, restore_random_state
from fp8train.errors import CheckpointError
from fp8train.optim import OptimConfig, build_optimizer
from fp8train.recipe import load_recipe
from tests.checkpoint.tiny_checkpoint import (
    DAMAGE,
    Tiny,
    save,
    save_checkpoint,
    saved_steps,
    start,
    train,
    training_state,
)

MOMENTS = ["fp32", "bf16"]


@pytest.mark.parametrize("moments", MOMENTS)
def test_resume_continues_bit_for_bit(tmp_path, moments):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    model, optimizer = start(moments)
    train(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model, optimizer, training_state())
    straight = train(model, optimizer, 4)

    random.seed(99)
    other, other_optimizer = start(moments)
    train(other, other_optimizer, 1)
    open_checkpoint(tmp_path).restore(other, other_optimizer)
    assert train(other, other_optimizer, 4) == straight
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][key])
            assert value.dtype == other_optimizer.state[b][key].dtype


def test_resume_before_the_first_step_has_no_moments(tmp_path):
    model, optimizer = start()
    save_checkpoint(tmp_path, 0, model, optimizer, training_state())
    other, other_optimizer = start()
    train(other, other_optimizer, 2)
    open_checkpoint(tmp_path).restore(other, other_optimizer)
    assert not other_optimizer.state_dict()["state"]


def test_restore_keeps_the_hyper_parameters_of_the_resuming_run(tmp_path):
    save(tmp_path, 1)
    torch.manual_seed(0)
    model = Tiny()
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.3))
    open_checkpoint(tmp_path).restore(model, optimizer)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_restored_run_holds_no_map_of_the_files(tmp_path):
    """A map would keep a removed checkpoint's space, and a file that is cut off would kill the process."""
    path = save(tmp_path, 1)
    model, optimizer = start()
    open_checkpoint(path).restore(model, optimizer)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_checkpoint_can_be_sent_to_other_ranks(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path, 1))
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


def test_weights_are_fp32_and_a_tied_one_is_stored_once(tmp_path):
    path = save(tmp_path, 1)
    stored = load_file(path / "model.safetensors")
    assert set(stored) == {"embed_tokens.weight", "proj.weight", "proj.bias", "norm.weight", "norm.bias"}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    state = open_checkpoint(path).load_model_state()
    assert torch.equal(state["lm_head.weight"], state["embed_tokens.weight"])
    Tiny().load_state_dict(state)


@pytest.mark.parametrize("moments", MOMENTS)
def test_moments_are_stored_by_parameter_name_in_their_own_dtype(tmp_path, moments):
    stored = load_file(save(tmp_path, 1, moments) / "optimizer.safetensors")
    assert {name.split("/")[0] for name in stored} == {"step", "exp_avg", "exp_avg_sq"}
    want = torch.bfloat16 if moments == "bf16" else torch.float32
    assert stored["exp_avg/proj.weight"].dtype == stored["exp_avg_sq/proj.weight"].dtype == want


def test_checkpoint_tells_step_config_and_recipe(tmp_path):
    path = save(tmp_path, 7)
    checkpoint = open_checkpoint(path)
    assert path == tmp_path / "checkpoints" / "step_00000007"
    assert (checkpoint.step, checkpoint.config.steps, checkpoint.recipe_hash) == (7, 10, "abc")
    assert (checkpoint.recipe.name, checkpoint.recipe.rules[0].use) == ("blockwise", "bf16")
    assert checkpoint.state.versions["torch"] == torch.__version__


def test_progress_survives_exactly(tmp_path):
    model, optimizer = start()
    progress = {"skipped": 3, "seconds": 0.1 + 0.2, "sum": 2**63 + 1, "loss": float("inf")}
    save_checkpoint(tmp_path, 1, model, optimizer, training_state(progress=progress, data_position={"sample": 640}))
    state = open_checkpoint(tmp_path).state
    assert (state.progress, state.data_position) == (progress, {"sample": 640})


def test_model_weights_alone_can_be_restored(tmp_path):
    path = save(tmp_path, 1)
    model = Tiny()
    open_checkpoint(path).restore(model)
    assert torch.equal(model.proj.weight, load_file(path / "model.safetensors")["proj.weight"])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_gets_its_own_generators_back(tmp_path, rank):
    model, optimizer = start()
    states, draws = [], []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(random_state())
        draws.append(torch.rand(1).item())
    save_checkpoint(tmp_path, 1, model, optimizer, training_state(random_states=states))
    torch.manual_seed(7)
    draws.append(torch.rand(1).item())  # rank 2 was not in the saved run and keeps its own
    torch.manual_seed(7)
    open_checkpoint(tmp_path).restore(model, optimizer, rank=rank)
    assert torch.rand(1).item() == draws[rank]


def test_random_state_covers_python_numpy_and_torch():
    def draw():
        return random.gauss(0, 1), float(np.random.standard_normal()), torch.randn(3).tolist()  # noqa: NPY002

    draw()  # leaves half of a pair in the generators of Python and NumPy
    state = json.loads(json.dumps(random_state()))
    first = draw()
    restore_random_state(state)
    assert draw() == first


def test_recipe_change_is_refused_unless_allowed(tmp_path):
    own, other = load_recipe("blockwise"), load_recipe("bf16")
    model, optimizer = start()
    save_checkpoint(tmp_path, 1, model, optimizer, training_state(recipe_hash=own.hash))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check_recipe(own, allow_change=False)
    checkpoint.check_recipe(other, allow_change=True)
    with pytest.raises(CheckpointError, match="checkpoint.allow_recipe_change=true") as caught:
        checkpoint.check_recipe(other, allow_change=False)
    named = f"recipe blockwise ({own.hash[:12]}), this run has bf16 ({other.hash[:12]}); needs the same"
    assert named in str(caught.value) and own.hash not in str(caught.value)


class Wider(Tiny):
    """Another shape of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 7)


class Longer(Tiny):
    """One more weight."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [(Wider, r"proj.weight has shape \[6, 6\], the model \[7, 6\] and 1 more"), (Longer, "extra.weight is missing")],
)
def test_checkpoint_of_another_model_is_refused_before_anything_is_loaded(tmp_path, model, message):
    checkpoint = open_checkpoint(save(tmp_path, 1))
    other = model()
    before = other.embed_tokens.weight.detach().clone()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(other)
    assert torch.equal(other.embed_tokens.weight, before)


HALF, MOMENT = torch.ones(6, 6, dtype=torch.bfloat16), "exp_avg/proj.weight"
REWRITTEN = {
    "other_dtype": ("model", {"proj.weight": HALF}, True, "proj.weight is torch.bfloat16; needs torch.float32"),
    "no_header": ("model", {}, False, "model.safetensors: its header does not say what is tied"),
    "moment_shape": ("optimizer", {MOMENT: torch.ones(6)}, True, rf"{MOMENT} has shape \[6\], the optimizer \[6, 6\]"),
    "moment_of_nothing": ("optimizer", {"exp_avg/other": torch.ones(6)}, True, "exp_avg/other is unknown to the optim"),
    "no_parameters": ("optimizer", {}, False, "optimizer.safetensors: its header does not say what is parameters"),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_file_that_another_program_wrote_anew_is_refused(tmp_path, case):
    file, changes, header, message = REWRITTEN[case]
    path = save(tmp_path, 1) / f"{file}.safetensors"
    tensors, metadata = read_tensors(path)
    save_file(
        {name: tensor.clone() for name, tensor in (tensors | changes).items()}, path, metadata if header else None
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, check_content=False).restore(*start())


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("state.json", {"progress": [1]}, r"lacks keys or has others; needs .*progress \(dict\)"),
        ("COMPLETE", {"sequence": "x"}, "is damaged"),
    ],
)
def test_value_of_another_kind_is_refused(tmp_path, file, changes, message):
    path = save(tmp_path, 1) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path.parent, check_content=False)


def test_other_trainable_parameters_are_refused(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path, 1))
    model = Tiny()
    model.proj.requires_grad_(False)
    with pytest.raises(CheckpointError, match="proj.weight is unknown to the optimizer"):
        checkpoint.restore(model, build_optimizer(model, OptimConfig()))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "want"),
    [(None, None, [5, 10, 15, 20, 25]), (2, None, [20, 25]), (1, 10, [10, 20, 25]), (9, 10, [5, 10, 15, 20, 25])],
    ids=["all", "last_two", "last_and_every_ten", "more_than_there_are"],
)
def test_retention(tmp_path, keep_last, keep_every, want):
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, step, last=keep_last, every=keep_every)
    assert saved_steps(tmp_path) == want


def test_retention_neither_counts_nor_removes_a_damaged_folder(tmp_path):
    save(tmp_path, 10)
    DAMAGE["marker_missing"](save(tmp_path, 20))
    save(tmp_path, 30, last=2)
    assert saved_steps(tmp_path) == [10, 20, 30]
