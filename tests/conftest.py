"""Set-up of every test process: threads, the kernel interpreter without a GPU, uninitialised memory that shows."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported; inherited by the processes that tests start. Threads beyond the cores cost up to 12 times.
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several, as launch/test.sh wants them on any number of cores
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.hardware import requires_gpu  # noqa: E402
from tests.interpreter import make_exact  # noqa: E402

__all__ = ["requires_gpu"]

UNIT_FOLDERS = {"backends", "kernels", "nn", "quant"}


def pytest_configure() -> None:
    """Kernels run in Triton's interpreter where there is no GPU; it reads the variable when a kernel is defined."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        make_exact()


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    """A process compiles a function eight times at most, and which tests share one is chance."""
    yield
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


@pytest.fixture(autouse=True)
def nan_filled_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In unit tests of arithmetic torch.empty is filled with NaN, so that memory which nobody wrote is seen."""
    folder = Path(request.node.path).relative_to(Path(__file__).parent).parts[0]
    if folder not in UNIT_FOLDERS or request.node.get_closest_marker("uninitialized_memory"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # fills memory of torch.empty with NaN, also inside operators
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
