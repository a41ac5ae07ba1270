"""A window of steps under torch.profiler: one Chrome trace a rank, and a table of the dearest operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fp8train.distributed import World

TABLE_ROWS = 30


class ProfileWindow:
    """Profiles the steps FIRST to LAST, counted from 1, into run_dir/profile.

    Args:
        steps: [FIRST, LAST]; None profiles nothing.
        info: takes the line that says where the files are.
    """

    def __init__(self, steps: Sequence[int] | None, run_dir: Path, world: World, info: Callable[[str], None]) -> None:
        self._first, self._last = steps if steps is not None else (0, -1)
        self._folder = run_dir / "profile"
        self._world, self._info = world, info
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call before a step."""
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.__enter__()

    def after(self, step: int) -> None:
        """Call after a step; ends the window with its last."""
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """End the window, complete or not: write the files and say where."""
        if self._profile is None:
            return
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        self._profile.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"rank{self._world.rank}"
        self._profile.export_chrome_trace(f"{stem}.json")
        order = "self_cuda_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
        Path(f"{stem}.txt").write_text(table, encoding="utf-8")
        self._profile = None
        self._info(f"profile of steps {self._first} to {self._last}: {stem}.json (chrome://tracing) and {stem}.txt")
