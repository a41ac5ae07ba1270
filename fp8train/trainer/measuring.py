"""What a run measures about itself: speed, memory, and a hash of the tokens that it was fed."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import resource
import statistics
from array import array
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fp8train.config import RunConfig
from fp8train.data import Batch
from fp8train.distributed import World
from fp8train.metrics import peak_flops
from fp8train.models import flops_per_token
from fp8train.trainer.environment import device_name
from fp8train.trainer.step import StepResult

MASK = (1 << 63) - 1


class Speed:
    """Tokens per second of the steps of this process, without the first few.

    Args:
        skip_steps: steps that do not count: allocation, compilation and caches make them slow, in every process again.
    """

    def __init__(self, skip_steps: int) -> None:
        self.process_step = 0  # how many steps this process has done
        self._skip = skip_steps
        self._steps: deque[float] = deque(maxlen=50)
        self._rates = array("d")  # 8 bytes a step: a run may have millions

    def add(self, tokens: int, seconds: float) -> None:
        """Record one step."""
        self.process_step += 1
        if self.process_step <= self._skip:
            return
        self._steps.append(seconds)
        self._rates.append(tokens / seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps; None before the first that counts."""
        return statistics.median(self._rates) if self._rates else None

    def eta_seconds(self, steps_left: int) -> float | None:
        """Time for so many more steps, by the mean of the last 50."""
        return steps_left * statistics.fmean(self._steps) if self._steps else None


class PeakMemory:
    """Peak memory since it was made: of the CUDA allocator, or of the whole process where the device is a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_peak_rss()

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _peak_rss()


class StreamHash:
    """Hash of the sequences that a run was fed: the same for any number of ranks and any split into micro-batches.

    Sum modulo 2^63 of a digest of (sample number, token ids) of each, so that parts can be added in any order.

    Args:
        start: sum of an earlier part of the run, on rank 0; 0 on the others.
    """

    def __init__(self, start: int = 0) -> None:
        self._sum = start

    def add(self, batches: Iterable[Batch]) -> None:
        """Take in the micro-batches of this rank."""
        for batch in batches:
            for number, row in zip(batch.sample_ids, batch.tokens.numpy(), strict=True):
                digest = hashlib.sha256(number.to_bytes(8, "little") + row.astype("<i8").tobytes()).digest()
                self._sum = (self._sum + int.from_bytes(digest[:8], "little")) & MASK

    def total(self, world: World) -> int:
        """Sum over all ranks; every rank must call it."""
        return sum(world.all_gather_object(self._sum)) & MASK


def _reset_peak_rss() -> None:
    """Set the kernel's high-water mark of this process to what it uses at present, where the kernel lets us."""
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)  # or what an earlier run in this process has freed would count as ours
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not Linux, or a sandbox: the peak then counts from the start of the process
        return


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_row(
    config: RunConfig, world: World, step: int, result: StepResult, lr: float, seconds: float
) -> dict[str, Any]:
    """What metrics.jsonl says of a step that took `seconds`; mfu where the device's peak is known."""
    tokens_per_second = config.global_batch_tokens / seconds
    row: dict[str, Any] = {
        "step": step,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_seen": step * config.global_batch_tokens,
        "tokens_per_second": tokens_per_second,
        "step_seconds": seconds,
    }
    peak = peak_flops(device_name(world.device))
    if peak is not None:
        row["mfu"] = flops_per_token(config.model, config.seq_len) * tokens_per_second / (peak * world.world_size)
    return row
