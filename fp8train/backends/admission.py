"""Whether an entry of the launch table may be used on this device: checked once, in a process of its own, and kept.

A warp-specialised kernel that a toolchain compiles wrongly gives wrong numbers or never ends. So before its first use
on a new combination of GPU, versions and kernel source, an entry multiplies test operands in a child process with a
time limit, against FP64; a wrong number, a crash and a hang all refuse it by name, and the next entry or the plain
variant runs in its place.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fp8train._layout import folder
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import quantize

LOG = logging.getLogger("fp8train")
SECONDS = 180  # of which about 20 for the imports and a compilation; the products take milliseconds
WRONG, UNDECIDED = 1, 3  # exit statuses of the check
SHAPES = ((128, 128, 128), (300, 200, 272), (1, 512, 1040), (513, 129, 64), (2048, 1536, 1024), (384, 256, 16384))
FP32_CALC_DIFF = 1e-7  # the tensor core keeps about 14 bits of a partial sum: (2^-14)^2 and some
BF16_CALC_DIFF = 5e-6  # rounding to BF16 is 1.3e-6
SIGNED_BIAS = 1e-3  # of a sum of positive products; without promotion it grows with K


class Admission:
    """Verdicts on the entries of this process's devices."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[str, str, int], str | None] = {}

    @property
    def refused(self) -> list[str]:
        """Entries that were refused, each with its reason."""
        return sorted(f"{op} {entry}: {reason}" for (op, entry, _), reason in self._verdicts.items() if reason)

    def admits(self, operation: str, entry: str, device: torch.device) -> bool:
        """Whether the entry passed its check on that device; the check is made now if it never was."""
        key = (operation, entry, device.index if device.index is not None else torch.cuda.current_device())
        if key not in self._verdicts:
            if torch.cuda.is_current_stream_capturing():
                return False  # a graph that is being captured must not wait for a check; the plain variant serves it
            self._verdicts[key] = _verdict(*key)
        return self._verdicts[key] is None


def _verdict(operation: str, entry: str, index: int) -> str | None:
    """Why the entry is refused, or None; from the cache, or checked now and, where decided, put there."""
    path = cache_folder() / f"kernels_{_fingerprint(operation, index)}.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a machine check once
        known = json.loads(path.read_text()) if path.is_file() else {}
        if entry in known:
            return known[entry]
        reason, decided = _check_in_child(operation, entry, index)
        if decided:
            path.write_text(json.dumps(known | {entry: reason}, indent=1, sort_keys=True))
    device = torch.cuda.get_device_name(index)
    if reason is None:
        LOG.info("kernels: %s entry %s checked on %s: correct", operation, entry, device)
    else:
        LOG.warning("kernels: %s entry %s refused on %s: %s; the next entry is used", operation, entry, device, reason)
    return reason


def _check_in_child(operation: str, entry: str, index: int) -> tuple[str | None, bool]:
    """(reason against the entry or None, whether that is decided for good)."""
    command = [sys.executable, "-m", "fp8train.backends.admission", operation, entry, str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"its check did not end in {SECONDS} seconds", True
    lines = (done.stdout if done.returncode == WRONG else done.stderr).strip().splitlines()
    said = lines[-1] if lines else "no message"
    if done.returncode == 0:
        return None, True
    if done.returncode == UNDECIDED:
        return f"it could not be checked: {said}", False
    return (said if done.returncode == WRONG else f"its check ended with status {done.returncode}: {said}"), True


def cache_folder() -> Path:
    """Folder of the user's that outlives the process; where there is none, one that does not."""
    try:
        path = Path.home() / ".cache" / "fp8train"
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="fp8train-"))


def _fingerprint(operation: str, index: int) -> str:
    """What a verdict depends on: the GPU, the versions that compile for it, the kernel's source and the check's."""
    triton = importlib.import_module("triton")
    properties = torch.cuda.get_device_properties(index)
    parts = [
        properties.name, f"{properties.major}.{properties.minor}", torch.__version__, str(torch.version.cuda),
        triton.__version__, operation, Path(__file__).read_text(),
    ]  # fmt: skip
    parts += [path.read_text() for path in sorted(folder("kernels").glob("gemm*.py"))]  # they share code
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def check(
    operation: str, entry: str, device: torch.device, shapes: Sequence[tuple[int, int, int]] = SHAPES
) -> str | None:
    """Multiply random and positive operands with an entry; what is wrong with the product, or None.

    Args:
        operation: "gemm" or "gemm_wgrad".
        entry: a key of its CONFIGS.
        device: where to multiply.
        shapes: M, N, K of the products.
    """
    module = importlib.import_module(f"fp8train.kernels.{operation}")
    launch, right = getattr(module, operation), "128x128" if operation == "gemm" else "1x128"
    for number, (M, N, K) in enumerate(shapes):
        for positive in (False, True):
            a = _operand(M, K, "1x128", 2 * number, positive, device)
            b = _operand(N, K, right, 2 * number + 1, positive, device)
            if reason := module.refusal(entry, a.qdata, b.qdata, a.scale_inv, b.scale_inv):
                return f"{entry} refuses operands of its table: {reason}"
            for arguments, plus, limit in _variants(operation, M, N, device):
                y = launch(a.qdata, b.qdata, a.scale_inv, b.scale_inv, config=entry, **arguments)
                expected = a.dequantize().double() @ b.dequantize().double().T + plus.double()
                if reason := _difference(y, expected, limit, positive):
                    return f"{reason} for M, N, K = {M}, {N}, {K}"
    return None


def _operand(rows: int, cols: int, block: str, seed: int, positive: bool, device: torch.device) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * torch.exp2(torch.randint(-8, 9, (rows, 1), generator=generator))
    q = quantize(x.abs() if positive else x, QuantSpec.parse(f"e4m3 {block}"))
    return QTensor(q.qdata.to(device), q.scale_inv.t().contiguous().t().to(device), q.spec)


def _variants(operation: str, M: int, N: int, device: torch.device) -> list[tuple[dict[str, object], Tensor, float]]:
    """Arguments of the launcher, what they add to the product, and the calc_diff that is allowed."""
    nothing, bias = torch.zeros((), device=device), torch.linspace(-1, 1, N, device=device)
    filled = torch.full((M, N), float("nan"), device=device)
    if operation == "gemm":
        return [
            ({"out": filled.to(torch.bfloat16)}, nothing, BF16_CALC_DIFF),
            ({"out": filled, "bias": bias}, bias, FP32_CALC_DIFF),
        ]
    before = bias.repeat(M, 1)
    return [
        ({"out": filled}, nothing, FP32_CALC_DIFF),
        ({"out": before.clone(), "accumulate": True}, before, FP32_CALC_DIFF),
    ]


def _difference(y: Tensor, expected: Tensor, limit: float, positive: bool) -> str | None:
    error = y.double() - expected
    energy = (y.double() ** 2 + expected**2).sum(dim=1)
    diff = float(((error**2).sum(dim=1) / energy).max())  # by rows: their magnitudes differ by up to 2^16
    if not diff <= limit:  # NaN too
        return f"its product has calc_diff {diff:.1e} against FP64, above {limit:.0e}"
    bias = float(error.sum() / expected.sum()) if positive else 0.0
    if abs(bias) > SIGNED_BIAS:
        return f"its sums of positive products are off by {bias:.1e}, more than {SIGNED_BIAS:.0e}"
    return None


def main(argv: Sequence[str]) -> int:
    """Check one entry on one GPU; the last line printed says what is wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("operation", choices=("gemm", "gemm_wgrad"))
    parser.add_argument("entry")
    parser.add_argument("index", type=int)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda", arguments.index)
    try:
        torch.empty(2**28, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return UNDECIDED
    reason = check(arguments.operation, arguments.entry, device)
    sys.stdout.write(f"{reason or 'correct'}\n")
    return WRONG if reason else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
