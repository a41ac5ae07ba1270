"""Checkpoints: bit-for-bit resume, damage, full disks, retention."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fp8train.checkpoint import TrainingState, files, find_resume, open_checkpoint, save_checkpoint
from fp8train.checkpoint.files import FolderWriter
from fp8train.checkpoint.random_state import random_state, restore_random_state
from fp8train.config import RunConfig, config_to_dict
from fp8train.errors import CheckpointError
from fp8train.optim import OptimConfig, build_optimizer
from tests.full_disk import files_of_at_most

MOMENTS = ["fp32", "bf16"]


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


def _start(moments="fp32"):
    torch.manual_seed(0)
    model = Tiny()
    return model, build_optimizer(model, OptimConfig(lr=1e-2), moments)


def _train(model, optimizer, steps):
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


def _state(**changes):
    values = {
        "config": config_to_dict(RunConfig(steps=10, run_dir="run")),
        "recipe_document": {"version": 1, "rules": [{"match": "*", "use": "bf16"}]},
        "recipe_text": "version: 1\n",
        "recipe_hash": "abc",
        "random_states": [random_state()],
    }
    return TrainingState(**{**values, **changes})


def _save(run_dir, step, moments="fp32", **options):
    model, optimizer = _start(moments)
    _train(model, optimizer, 1)
    return save_checkpoint(run_dir, step, model, optimizer, _state(), **options)


def _steps(run_dir):
    return sorted(int(path.name.removeprefix("step_")) for path in (Path(run_dir) / "checkpoints").iterdir())


def _flip_bit(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("moments", MOMENTS)
def test_resume_continues_bit_for_bit(tmp_path, moments):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    model, optimizer = _start(moments)
    _train(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model, optimizer, _state())
    straight = _train(model, optimizer, 4)

    random.seed(99)
    other, other_optimizer = _start(moments)
    _train(other, other_optimizer, 1)
    open_checkpoint(tmp_path).restore(other, other_optimizer)
    assert _train(other, other_optimizer, 4) == straight
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][key])
            assert value.dtype == other_optimizer.state[b][key].dtype


def test_resume_before_the_first_step_has_no_moments(tmp_path):
    model, optimizer = _start()
    save_checkpoint(tmp_path, 0, model, optimizer, _state())
    other, other_optimizer = _start()
    _train(other, other_optimizer, 2)
    open_checkpoint(tmp_path).restore(other, other_optimizer)
    assert not other_optimizer.state_dict()["state"]


def test_restore_keeps_the_hyper_parameters_of_the_resuming_run(tmp_path):
    _save(tmp_path, 1)
    torch.manual_seed(0)
    model = Tiny()
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.3))
    open_checkpoint(tmp_path).restore(model, optimizer)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_restored_run_holds_no_map_of_the_files(tmp_path):
    """A map would keep a removed checkpoint's space, and a file that is cut off would kill the process."""
    path = _save(tmp_path, 1)
    model, optimizer = _start()
    open_checkpoint(path).restore(model, optimizer)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_checkpoint_can_be_sent_to_other_ranks(tmp_path):
    checkpoint = open_checkpoint(_save(tmp_path, 1))
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


def test_weights_are_fp32_and_a_tied_one_is_stored_once(tmp_path):
    path = _save(tmp_path, 1)
    stored = load_file(path / "model.safetensors")
    assert set(stored) == {"embed_tokens.weight", "proj.weight", "proj.bias", "norm.weight", "norm.bias"}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    state = open_checkpoint(path).load_model_state()
    assert torch.equal(state["lm_head.weight"], state["embed_tokens.weight"])
    Tiny().load_state_dict(state)


@pytest.mark.parametrize("moments", MOMENTS)
def test_moments_are_stored_by_parameter_name_in_their_own_dtype(tmp_path, moments):
    stored = load_file(_save(tmp_path, 1, moments) / "optimizer.safetensors")
    assert {name.split("/")[0] for name in stored} == {"step", "exp_avg", "exp_avg_sq"}
    want = torch.bfloat16 if moments == "bf16" else torch.float32
    assert stored["exp_avg/proj.weight"].dtype == stored["exp_avg_sq/proj.weight"].dtype == want


def test_checkpoint_tells_step_config_and_recipe(tmp_path):
    path = _save(tmp_path, 7)
    checkpoint = open_checkpoint(path)
    assert path == tmp_path / "checkpoints" / "step_00000007"
    assert (checkpoint.step, checkpoint.config.steps, checkpoint.recipe_hash) == (7, 10, "abc")
    assert (checkpoint.recipe.name, checkpoint.recipe.rules[0].use) == ("blockwise", "bf16")
    assert checkpoint.state.versions["torch"] == torch.__version__


def test_progress_survives_exactly(tmp_path):
    model, optimizer = _start()
    progress = {"skipped": 3, "seconds": 0.1 + 0.2, "sum": 2**63 + 1, "loss": float("inf")}
    save_checkpoint(tmp_path, 1, model, optimizer, _state(progress=progress, data_position={"sample": 640}))
    state = open_checkpoint(tmp_path).state
    assert (state.progress, state.data_position) == (progress, {"sample": 640})


def test_model_weights_alone_can_be_restored(tmp_path):
    path = _save(tmp_path, 1)
    model = Tiny()
    open_checkpoint(path).restore(model)
    assert torch.equal(model.proj.weight, load_file(path / "model.safetensors")["proj.weight"])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_gets_its_own_generators_back(tmp_path, rank):
    model, optimizer = _start()
    states, draws = [], []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(random_state())
        draws.append(torch.rand(1).item())
    save_checkpoint(tmp_path, 1, model, optimizer, _state(random_states=states))
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


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path, damage):
    _save(tmp_path, 10)
    _save(tmp_path, 20)
    damage(_save(tmp_path, 30))
    found = find_resume(tmp_path, "auto")
    assert found.step == 20
    assert len(found.skipped) == 1
    assert "step_00000030" in found.skipped[0]
    assert "\n" not in found.skipped[0]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoint_named_by_path_is_refused(tmp_path, damage):
    path = _save(tmp_path, 10)
    damage(path)
    with pytest.raises(CheckpointError, match="step_00000010"):
        find_resume(tmp_path, str(path))


def test_old_damage_is_not_reported(tmp_path):
    DAMAGE["marker_missing"](_save(tmp_path, 10))
    _save(tmp_path, 20)
    assert find_resume(tmp_path, "auto").skipped == ()


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    for step, name in ((10, "weights_changed"), (20, "marker_missing")):
        DAMAGE[name](_save(tmp_path, step))
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        find_resume(tmp_path, "auto")


def test_nothing_to_resume_from_gives_none(tmp_path):
    assert find_resume(tmp_path / "new", "auto") is None
    _save(tmp_path, 1)
    assert find_resume(tmp_path, "never") is None


@pytest.mark.parametrize("which", ["checkpoint", "run_folder"])
def test_resume_by_path(tmp_path, which):
    path = _save(tmp_path / "first", 5)
    assert find_resume(tmp_path / "second", str(path if which == "checkpoint" else tmp_path / "first")).step == 5


def test_resume_takes_what_was_saved_last_not_the_highest_step(tmp_path):
    for step in (10, 20, 30):
        _save(tmp_path, step)
    _save(tmp_path, 15)  # as after resume=.../step_00000010
    assert find_resume(tmp_path, "auto").step == 15


def test_same_step_again_replaces_the_checkpoint(tmp_path):
    DAMAGE["weights_changed"](_save(tmp_path, 10))
    _save(tmp_path, 10)
    assert find_resume(tmp_path, "auto").step == 10
    assert _steps(tmp_path) == [10]


FOREIGN = {
    "missing": lambda path: None,
    "file": lambda path: path.write_text("x"),
    "empty_folder": lambda path: path.mkdir(),
    "hugging_face": lambda path: (path.mkdir(), save_file({"w": torch.zeros(2)}, path / "model.safetensors")),
    "other_marker": lambda path: (path.mkdir(), (path / "COMPLETE").write_text('{"format": "other"}')),
    "marker_is_a_list": lambda path: (path.mkdir(), (path / "COMPLETE").write_text("[1]")),
    "later_version": lambda path: (
        path.mkdir(),
        (path / "COMPLETE").write_text('{"format": "fp8train checkpoint", "version": 99}'),
    ),
    "no_keys": lambda path: (
        path.mkdir(),
        (path / "COMPLETE").write_text('{"format": "fp8train checkpoint", "version": 1}'),
    ),
    "run_without_checkpoints": lambda path: (path / "checkpoints").mkdir(parents=True),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_path_is_refused_with_its_name(tmp_path, make):
    make(tmp_path / "thing")
    with pytest.raises(CheckpointError, match="thing"):
        open_checkpoint(tmp_path / "thing")


def test_recipe_change_is_refused_unless_allowed(tmp_path):
    checkpoint = open_checkpoint(_save(tmp_path, 1))
    checkpoint.check_recipe("abc", allow_change=False)
    checkpoint.check_recipe("def", allow_change=True)
    with pytest.raises(CheckpointError, match="recipe abc, this run has def.*checkpoint.allow_recipe_change=true"):
        checkpoint.check_recipe("def", allow_change=False)


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
    checkpoint = open_checkpoint(_save(tmp_path, 1))
    other = model()
    before = other.embed_tokens.weight.detach().clone()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(other)
    assert torch.equal(other.embed_tokens.weight, before)


def test_other_trainable_parameters_are_refused(tmp_path):
    checkpoint = open_checkpoint(_save(tmp_path, 1))
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
        _save(tmp_path, step, keep_last=keep_last, keep_every=keep_every)
    assert _steps(tmp_path) == want


def test_retention_neither_counts_nor_removes_a_damaged_folder(tmp_path):
    _save(tmp_path, 10)
    DAMAGE["marker_missing"](_save(tmp_path, 20))
    _save(tmp_path, 30, keep_last=2)
    assert _steps(tmp_path) == [10, 20, 30]


def test_leftovers_of_a_killed_save_are_cleared_away(tmp_path):
    (tmp_path / "checkpoints" / ".step_00000001.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step_00000001.tmp" / "model.safetensors").write_bytes(b"half")
    assert find_resume(tmp_path, "auto") is None
    _save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_write_that_fails_leaves_no_half_checkpoint_and_the_earlier_ones(tmp_path):
    _save(tmp_path, 10)
    model, optimizer = _start()
    state = _state()
    with (
        files_of_at_most(1000),
        pytest.raises(CheckpointError, match=r"step_00000020: cannot be written: File too large") as caught,
    ):
        save_checkpoint(tmp_path, 20, model, optimizer, state, keep_last=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]
    assert find_resume(tmp_path, "auto").step == 10


def test_write_that_fails_leaves_the_checkpoint_of_the_same_step(tmp_path):
    path = _save(tmp_path, 10)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    model, optimizer = _start()
    state = _state()
    with files_of_at_most(1000), pytest.raises(CheckpointError):
        save_checkpoint(tmp_path, 10, model, optimizer, state)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"])
def test_full_disk_at_any_file_is_one_line(tmp_path, monkeypatch, name):
    _save(tmp_path, 10)
    write = FolderWriter.write

    def full(self, file, pieces):
        if file == name:
            raise OSError(28, "No space left on device")
        write(self, file, pieces)

    monkeypatch.setattr(files.FolderWriter, "write", full)
    with pytest.raises(CheckpointError, match="No space left on device; needs a writable run_dir with space"):
        _save(tmp_path, 20)
    assert _steps(tmp_path) == [10]


def test_place_that_cannot_hold_a_folder_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        _save(tmp_path, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CheckpointError, match="Permission denied"):
        _save(tmp_path, 1)


def test_interrupt_while_saving_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(self, name, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.FolderWriter, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path, 1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_killed_save_costs_only_the_checkpoint_that_was_being_written(tmp_path):
    """SIGKILL after the first file: the next process finds step 1 and clears the rest away."""
    _save(tmp_path, 1)
    script = f"""
import os, signal
from fp8train.checkpoint.files import FolderWriter, new_folder
from pathlib import Path
with new_folder(Path({str(tmp_path)!r}) / "checkpoints" / "step_00000002", 2, 2) as writer:
    writer.write("model.safetensors", iter([b"half"]))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, timeout=60, check=False)
    assert done.returncode == -9
    assert find_resume(tmp_path, "auto").step == 1
    _save(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000003"]


def test_safetensors_of_every_dtype_and_shape_are_read_back_by_the_library(tmp_path):
    tensors = {
        **{str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in files._DTYPES},
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "view": torch.arange(10.0)[3:7],
    }
    FolderWriter(tmp_path).write_tensors("x.safetensors", tensors, {"key": "value"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_fp8_in_a_state_dict_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="FP8 is derived state"):
        FolderWriter(tmp_path).write_tensors("x", {"codes": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {})
