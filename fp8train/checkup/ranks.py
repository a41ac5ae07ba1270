"""Check of the number of ranks: two processes on the CPU, against one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fp8train.checkup.outcome import Outcome, distance
from fp8train.checkup.subject import PARTS, KeepGradients, Subject
from fp8train.checkup.training import split_limit
from fp8train.config import RunConfig, config_from_dict, config_to_dict
from fp8train.distributed import init, rank_exit_code
from fp8train.errors import TrainingError
from fp8train.trainer.assembly import spread
from fp8train.trainer.step import train_step

RANKS = 2
TIMEOUT_SECONDS = 600


def ranks(subject: Subject) -> Outcome:
    """Two ranks on the CPU, by the run's strategy and through gloo, give the gradient of one."""
    with tempfile.TemporaryDirectory(prefix="fp8train-doctor-") as folder:
        two = _gradients(subject.config, Path(folder), RANKS)
        if subject.device.type == "cpu":
            result, gradients = subject.gradients(subject.fresh(), subject.batches())
            one = result.loss, gradients
        else:
            one = _gradients(subject.config, Path(folder), 1)
    apart, where = distance(one[1], two[1])
    limit = split_limit(subject, subject.fresh())
    return Outcome(
        passed=apart <= limit and abs(one[0] - two[0]) <= limit * abs(one[0]),
        first=f"1 rank: loss {one[0]:.6f}",
        second=f"{RANKS} ranks: {two[0]:.6f}",
        detail=f"gradients apart {apart:.1e} ({where}), limit {limit:g}",
        meaning="gradients that are averaged where they must be summed, ranks that read the same sequences, or a "
        "loss that each rank divides by its own tokens.",
    )


def _gradients(config: RunConfig, folder: Path, ranks: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step on so many ranks, each a process."""
    settings, out = folder / "config.json", folder / f"{ranks}.pt"
    settings.write_text(json.dumps(config_to_dict(config)), encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*start, "-m", "fp8train.checkup.ranks", str(settings), str(out)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
        raise TrainingError(f"doctor: {ranks} processes on this machine failed: {' '.join(lines[:1])}")
    found = torch.load(out, weights_only=True)
    return found["loss"], found["gradients"]


def main(argv: Sequence[str]) -> int:
    """One rank: config.json, and where rank 0 saves loss and gradients."""
    values = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    with init(TIMEOUT_SECONDS, device_type="cpu") as world:
        torch.set_num_threads(max(1, torch.get_num_threads() // world.world_size))
        config = config_from_dict(values)
        config.parallel.shard_ranks = None  # of the run's ranks, which are more
        config.backend = config.backend if config.backend in ("cpu", "cpu_torch", "reference") else "auto"
        subject = Subject(config, world.device)
        model = subject.fresh().model
        replica = spread(model, config, world)
        keep = KeepGradients(model)
        batches = subject.batcher(world.rank, world.world_size).micro_batches(0)
        assert len(batches) * world.world_size == PARTS
        result = train_step(replica, keep, batches, world, clip=None)
        if world.main:
            torch.save({"loss": result.loss, "gradients": keep.gradients}, argv[1])
    return 0


if __name__ == "__main__":
    raise SystemExit(rank_exit_code(main))
