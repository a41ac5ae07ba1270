"""Where the time of one call goes: its kernels on a GPU, its operations on a CPU, by torch.profiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROWS = 15  # of a table
NAME_CHARACTERS = 88


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """A kernel or operation: its name, how often it ran in the call, and its own seconds in all."""

    name: str
    calls: int
    seconds: float


def kernel_times(call: Callable[[], Any], device: torch.device) -> list[KernelTime]:
    """What ran in one call, the dearest first; the call must have been made before, so that nothing is compiled."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    # a GPU's kernels are events of their own; the operation that launched one is told its time as well
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = [
        KernelTime(
            name=event.key,
            calls=event.count,
            seconds=(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6,
        )
        for event in found.key_averages()
        if event.device_type == wanted and not event.is_user_annotation
    ]
    return sorted((time for time in times if time.seconds > 0), key=lambda time: -time.seconds)


def kernel_table(arm: str, times: Sequence[KernelTime]) -> str:
    """The dearest as text, with their share of the sum."""
    total = sum(time.seconds for time in times)
    rest = times[ROWS:]
    lines = [f"{arm}: {1e3 * total:.2f} ms in {sum(time.calls for time in times):,} kernels or operations"]
    lines += [
        f"{1e3 * time.seconds:9.2f} ms {time.seconds / total:6.1%} {time.calls:6,}x {time.name[:NAME_CHARACTERS]}"
        for time in times[:ROWS]
    ]
    if rest:
        seconds = sum(time.seconds for time in rest)
        lines.append(f"{1e3 * seconds:9.2f} ms {seconds / total:6.1%} {sum(time.calls for time in rest):6,}x others")
    return "\n".join(lines) + "\n"
