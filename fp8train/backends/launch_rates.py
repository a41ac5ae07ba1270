"""Rates of the GEMMs' launch entries measured on a machine itself, which stand in for the launch table's there.

kernels/gemm_table.py holds what we measured on our cards. `fp8train bench entries write=true` measures every entry on
the GPU that is there, and the rates are kept beside the verdicts of admission.py, for that GPU, these versions and
these kernels alone. Which entry multiplies changes the time and no number, since all add the same products in the same
order; but a gradient below 2^-126, which some add to as to a zero (kernels/gemm_gluon.py).
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fp8train.backends.admission_checks import KERNEL_GEMMS
from fp8train.backends.kernel_codes import kernel
from fp8train.backends.toolchain import fingerprint
from fp8train.backends.user_cache import cache_folder
from fp8train.errors import BackendError
from fp8train.whole_file import write_whole

Rates = Mapping[str, tuple[int, int, float]]  # as in kernels/gemm_table.py: rows, columns, TFLOP/s of full waves


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates by operation, and the day they were measured."""

    date: str
    rates: Mapping[str, Rates]


def path_of(index: int) -> Path:
    """File of the rates of a GPU."""
    return cache_folder() / f"rates_{fingerprint(index)}.json"


@functools.cache
def measured(index: int) -> Measured | None:
    """What was measured on a GPU of this machine, as it was when the process first asked; None if nothing was.

    Raises:
        BackendError: the file is not one that `write` made.
    """
    path = path_of(index)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rates = {operation: _with_tiles(operation, content["rates"][operation]) for operation in KERNEL_GEMMS}
        return Measured(str(content["date"]), rates)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendError(
            f"launch rates: {path} cannot be read ({error!r}); needs what `fp8train bench entries write=true` writes. "
            "Delete it, or measure again."
        ) from error


def write(index: int, rates: Mapping[str, Mapping[str, float]]) -> Path:
    """Keep rates of full waves, TFLOP/s by operation and entry, for the processes that start from now on."""
    path = path_of(index)
    content = {"date": datetime.date.today().isoformat(), "rates": rates}
    write_whole(path, json.dumps(content, indent=1) + "\n")
    return path


def _with_tiles(operation: str, rates: Mapping[str, float]) -> Rates:
    configs = kernel(operation).CONFIGS
    tile_of = kernel("gemm_tile").tile_of
    return {entry: (*tile_of(configs[entry]), float(rate)) for entry, rate in rates.items()}
