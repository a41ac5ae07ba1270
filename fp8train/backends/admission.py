"""Whether a kernel may be used on this device: checked once, in a process of its own, and kept.

A toolchain may compile a kernel wrongly: ptxas 12.8 lost bytes of a transposed FP8 copy on an H100, and a
warp-specialised kernel may give wrong numbers or never end. So before the first use on a new combination of GPU,
versions and kernel sources (toolchain.py), child processes with a time limit check every entry of the launch table, the
plain ones and every quantiser (admission_checks.py), all at once. A wrong number, a crash and a hang all refuse a
kernel by name; the next entry, or torch, runs in its place. So it does where a check could not be made, but then the
next process tries it again. `python -m fp8train.backends` makes the checks ahead of time.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import logging
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock

import torch

from fp8train.backends.admission_checks import (
    KERNEL_GEMMS,
    OTHER_DTYPES,
    QUANTISERS,
    ROTATIONS,
    STANDBY,
    STREAM,
    TRANSPOSES,
    asked_of,
)
from fp8train.backends.check_process import NO_GPU, SECONDS, WRONG, Kernel, check_here, check_in_child, says_no_gpu
from fp8train.backends.toolchain import fingerprint
from fp8train.backends.user_cache import cache_folder
from fp8train.quant.formats import LinearPrecision
from fp8train.whole_file import write_whole

LOG = logging.getLogger("fp8train")
AT_ONCE = min(16, max(4, os.cpu_count() or 4))  # processes: compilers, each with up to a GiB of GPU memory


class Admission:
    """Verdicts on the kernels of this process's devices."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[str, str, int], str | None] = {}
        self._precisions: dict[LinearPrecision, None] = {}

    def expect(self, precisions: Iterable[LinearPrecision]) -> None:
        """Take what linears of these precisions will use into the checks that are made first."""
        self._precisions |= dict.fromkeys(precisions)

    @property
    def refused(self) -> list[str]:
        """Kernels that were refused, each with its reason."""
        return sorted(f"{op} {entry}: {reason}" for (op, entry, _), reason in self._verdicts.items() if reason)

    def admits(self, operation: str, entry: str, device: torch.device) -> bool:
        """Whether the kernel passed its check on that device; the checks are made now if they never were.

        On a CPU, where kernels are interpreted, all pass.
        """
        if device.type != "cuda":
            return True
        index = device.index if device.index is not None else torch.cuda.current_device()
        if (operation, entry, index) not in self._verdicts:
            if torch.cuda.is_current_stream_capturing():
                return False  # a graph that is being captured must not wait for a check; the plain way serves it
            alone = (operation, entry) in ROTATIONS  # a run in BF16 needs no other
            settled = [(op, name) for op, name, of in self._verdicts if of == index]
            found = verdicts(index, [(operation, entry)], settled, self._precisions, alone=alone)
            for (op, name), reason in found.items():
                self._verdicts.setdefault((op, name, index), reason)
        return self._verdicts[operation, entry, index] is None


def verdicts(
    index: int,
    wanted: Iterable[Kernel] = (),
    settled: Collection[Kernel] = (),
    precisions: Collection[LinearPrecision] = (),
    *,
    alone: bool = False,
    again: bool = False,
    seconds: float = SECONDS,
) -> dict[Kernel, str | None]:
    """Why each kernel is refused on a GPU, or None; from the cache, or checked now and, where decided, put there.

    Args:
        index: of the GPU.
        wanted: kernels to answer for besides those of the launch table and the quantisers.
        settled: kernels that this process has an answer for, also where that is not kept.
        precisions: of linears; also in what other forms these ask for them, the kernels that are used are checked.
        alone: only for these, and for what the cache has.
        again: forget what the cache has against kernels.
        seconds: for one check.
    """
    path = cache_folder() / f"kernels_{fingerprint(index)}.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a machine check once
        known = {name: reason for name, reason in _kept(path).items() if reason is None or not again}
        found: dict[Kernel, str | None] = {_kernel(name): reason for name, reason in known.items()}
        used = [] if alone else _used(index)
        forms = [(op, form) for op, name in used for each in precisions for form in asked_of(op, name, each)]
        asked = dict.fromkeys([*wanted, *used, *forms])
        missing = [kernel for kernel in asked if kernel not in found and kernel not in settled]
        made: dict[Kernel, tuple[str | None, bool]] = {}
        writing = Lock()

        def settle(kernel: Kernel) -> None:
            reason, final = made[kernel] = check_in_child(kernel, index, seconds)
            if final:  # kept at once: whoever ends this process has not made the others for nothing
                with writing:
                    known[" ".join(kernel)] = reason
                    write_whole(path, json.dumps(known, indent=1, sort_keys=True) + "\n")

        with ThreadPoolExecutor(AT_ONCE) as pool:
            checks = [pool.submit(settle, kernel) for kernel in sorted(missing, key=_must_end)]
            try:
                for check in as_completed(checks):
                    check.result()
            finally:
                for check in checks:
                    check.cancel()
    made = {kernel: made[kernel] for kernel in missing}  # in order, however they ended
    _log(made, torch.cuda.get_device_name(index))
    return found | {kernel: reason for kernel, (reason, _) in made.items()}


def _must_end(kernel: Kernel) -> bool:
    """Key that puts entries with specialised warps first: one that hangs takes the whole of its time."""
    return not kernel[1].startswith(("ws_", "gluon_"))


def _kept(path: Path) -> dict[str, str | None]:
    """Verdicts of earlier processes; none where the file is not a whole one."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(known, dict) and all(reason is None or isinstance(reason, str) for reason in known.values())
    return known if whole else {}


def _kernel(name: str) -> Kernel:
    operation, _, entry = name.partition(" ")
    return operation, entry


def _used(index: int) -> list[Kernel]:
    """What the backend uses on such a GPU."""
    table, capability = importlib.import_module("fp8train.kernels.gemm_table"), torch.cuda.get_device_capability(index)
    entries = dict.fromkeys([*table.listed(capability), *_plain(capability)])
    return [*entries, *QUANTISERS, *STREAM, *ROTATIONS]


def _plain(capability: tuple[int, int]) -> list[Kernel]:
    """What multiplies where no entry of the table does; all but the one that loads by pointers need TMA."""
    plain = {operation: importlib.import_module(f"fp8train.kernels.{operation}").PLAIN for operation in KERNEL_GEMMS}
    return [
        (operation, entry)
        for operation, entries in plain.items()
        for entry in entries
        if capability >= (9, 0) or entry.startswith("pointer")
    ]


def _entries(index: int) -> list[Kernel]:
    """Kernels that few runs use and, on a Hopper, every launch entry of the GEMMs: elsewhere some do not run."""
    seldom = [*STANDBY, *TRANSPOSES, *OTHER_DTYPES]
    if torch.cuda.get_device_capability(index)[0] != 9:
        return seldom
    configs = {
        operation: importlib.import_module(f"fp8train.kernels.{operation}").CONFIGS for operation in KERNEL_GEMMS
    }
    return [*seldom, *((operation, entry) for operation, entries in configs.items() for entry in entries)]


def _log(made: dict[Kernel, tuple[str | None, bool]], device: str) -> None:
    good = [" ".join(kernel) for kernel, (reason, _) in made.items() if reason is None]
    if good:
        LOG.info("kernels: checked on %s and correct: %s", device, ", ".join(good))
    for (operation, entry), (reason, _) in made.items():
        if reason is not None:
            LOG.warning("kernels: %s %s refused on %s: %s; another takes its place", operation, entry, device, reason)


def main(argv: Sequence[str]) -> int:
    """Check one kernel on one GPU, or all that are used there; the last line printed says what is wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("operation", nargs="?")
    parser.add_argument("entry", nargs="?")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="launch entries and quantisers too that others come before")
    parser.add_argument("--again", action="store_true", help="check anew what was refused before")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one check; what takes longer is refused")
    arguments = parser.parse_args(argv)
    if arguments.entry is not None:
        return check_here((arguments.operation, arguments.entry), arguments.device)
    if says_no_gpu():
        return NO_GPU
    wanted = _entries(arguments.device) if arguments.all else ()
    found = verdicts(arguments.device, wanted, again=arguments.again, seconds=arguments.seconds)
    own = importlib.import_module("fp8train.backends.launch_rates").measured(arguments.device)
    sys.stdout.write("" if own is None else f"launch table: measured on this machine, {own.date}\n")
    for (operation, entry), reason in sorted(found.items()):
        sys.stdout.write(f"{operation} {entry}: {reason or 'correct'}\n")
    return WRONG if any(found.values()) else 0
