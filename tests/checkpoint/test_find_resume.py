"""Which checkpoint a run goes on from: damaged ones, several, and folders that hold none."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fp8train.checkpoint import find_resume, open_checkpoint
from fp8train.errors import CheckpointError
from tests.checkpoint.tiny_checkpoint import DAMAGE, save, saved_steps


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path, damage):
    save(tmp_path, 10)
    save(tmp_path, 20)
    damage(save(tmp_path, 30))
    found = find_resume(tmp_path, "auto")
    assert found.step == 20
    assert len(found.skipped) == 1
    assert "step_00000030" in found.skipped[0]
    assert "\n" not in found.skipped[0] and "ake another" not in found.skipped[0]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoint_named_by_path_is_refused(tmp_path, damage):
    path = save(tmp_path, 10)
    damage(path)
    with pytest.raises(CheckpointError, match="step_00000010"):
        find_resume(tmp_path, str(path))


def test_old_damage_is_not_reported(tmp_path):
    DAMAGE["marker_missing"](save(tmp_path, 10))
    save(tmp_path, 20)
    assert find_resume(tmp_path, "auto").skipped == ()


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    for step, name in ((10, "weights_changed"), (20, "marker_missing")):
        DAMAGE[name](save(tmp_path, step))
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole") as caught:
        find_resume(tmp_path, "auto")
    message = str(caught.value)
    assert (
        "model.safetensors: differs from its checksum" in message and "step_00000020: has no COMPLETE file" in message
    )
    assert "ake another" not in message  # one remedy, not one for each checkpoint


def test_nothing_to_resume_from_gives_none(tmp_path):
    assert find_resume(tmp_path / "new", "auto") is None
    save(tmp_path, 1)
    assert find_resume(tmp_path, "never") is None


@pytest.mark.parametrize("which", ["checkpoint", "run_folder"])
def test_resume_by_path(tmp_path, which):
    path = save(tmp_path / "first", 5)
    assert find_resume(tmp_path / "second", str(path if which == "checkpoint" else tmp_path / "first")).step == 5


def test_resume_takes_what_was_saved_last_not_the_highest_step(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15)  # as after resume=.../step_00000010
    assert find_resume(tmp_path, "auto").step == 15


def test_same_step_again_replaces_the_checkpoint(tmp_path):
    DAMAGE["weights_changed"](save(tmp_path, 10))
    save(tmp_path, 10)
    assert find_resume(tmp_path, "auto").step == 10
    assert saved_steps(tmp_path) == [10]


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (FOREIGN["empty_folder"], "is neither a run folder .* nor a checkpoint .*Correct the path"),
        (FOREIGN["hugging_face"], "is neither a run folder .* nor a checkpoint .*Correct the path"),
        (FOREIGN["run_without_checkpoints"], "is a run folder without a checkpoint"),
    ],
    ids=["empty folder", "Hugging Face folder", "run without checkpoints"],
)
def test_folder_that_holds_no_checkpoint_is_called_what_it_is(tmp_path, make, message):
    make(tmp_path / "thing")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "thing")
