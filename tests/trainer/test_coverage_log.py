"""What a run says of its GEMMs is of all its steps, each once, however often it was interrupted."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_run import tiny_train


def counts(coverage: dict) -> dict[str, dict]:
    return {row["fqn"]: row["gemms"] for row in coverage["linears"]}


def test_a_run_that_goes_on_counts_the_steps_of_before(tmp_path: Path) -> None:
    whole = tiny_train(tmp_path, "steps=5", run="whole")
    tiny_train(tmp_path, "steps=2", "eval.every=1", run="parts")
    parts = tiny_train(tmp_path, "steps=5", run="parts")
    assert counts(parts.coverage) == counts(whole.coverage)
    assert parts.fp8_flops_share == whole.fp8_flops_share > 0


def test_a_run_that_begins_at_the_checkpoint_of_another_counts_its_own(tmp_path: Path) -> None:
    tiny_train(tmp_path, "steps=2", run="first")
    checkpoint = tmp_path / "first" / "checkpoints" / "step_00000002"
    own = counts(tiny_train(tmp_path, "steps=3", f"resume={checkpoint}", run="second").coverage)
    once = counts(tiny_train(tmp_path, "steps=1", run="once").coverage)
    assert own == once
