"""Which backend runs: a named one or a clear error; for "auto" the first that can, and why others were passed over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fp8train.backends.cpu import CpuBackend
from fp8train.backends.cublaslt import CublasltBackend
from fp8train.backends.deepgemm import DeepGemmBackend
from fp8train.backends.dequant_bf16 import DequantBackend
from fp8train.backends.hopper import hopper_backend
from fp8train.backends.interface import Backend
from fp8train.backends.reference import ReferenceBackend
from fp8train.backends.te import TransformerEngineBackend
from fp8train.backends.torchao import TorchaoBackend
from fp8train.backends.triton import TritonBackend
from fp8train.errors import BackendError
from fp8train.quant.formats import LinearPrecision

BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu": CpuBackend,
    "cpu_torch": functools.partial(CpuBackend, compiled=False),
    "cublaslt": CublasltBackend,
    "deepgemm": DeepGemmBackend,
    "dequant_bf16": DequantBackend,
    "reference": ReferenceBackend,
    "te": TransformerEngineBackend,
    "torchao": TorchaoBackend,
    "triton": TritonBackend,
}
# dequant_bf16: a GPU without FP8 units, or a recipe without FP8 kernels, trains with the same numbers; the log says so
_GPU_ORDER = ("triton", "cublaslt", "dequant_bf16")
PLANNED = "sm_90"  # stands for a device of this kind that the machine need not have: what would run there is asked
AUTO_ORDER = {"cpu": ("cpu",), "meta": ("cpu",), "cuda": _GPU_ORDER, PLANNED: _GPU_ORDER}


@dataclass(frozen=True, slots=True)
class Selection:
    """The backend that was chosen, and why the ones before it in the order were not."""

    backend: Backend
    reason: str


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend of that name; one object per process.

    Raises:
        BackendError: there is none of that name.
    """
    kind, _, options = name.partition(":")
    if kind == "hopper":
        return hopper_backend(options)
    if kind == "triton" and options:  # bench gemm measures one entry of the GEMMs' CONFIGS so
        return TritonBackend(options)
    if name not in BACKENDS:
        raise BackendError(f"backend: {name!r} is not known; needs one of auto, {', '.join(BACKENDS)}, hopper.")
    return BACKENDS[name]()


def select_backend(name: str, device_type: str, precisions: Iterable[LinearPrecision] = ()) -> Selection:
    """Choose the backend for a model, once.

    Args:
        name: "auto", or a backend's name.
        device_type: where the model's parameters are, e.g. "cpu", "cuda" or "meta"; PLANNED chooses for an H100 or H200
            without looking for one, and nothing can be computed then.
        precisions: all that the backend must serve.

    Returns:
        Selection: the backend and one line that says why.

    Raises:
        BackendError: the named backend cannot serve, or for "auto" none can; with each reason.
    """
    precisions = list(precisions)
    if name != "auto":
        backend = get_backend(name)
        if reason := _refusal(backend, device_type, precisions):
            raise BackendError(
                f"backend: {name} cannot be used: {reason}. Use backend=auto, or another machine or recipe."
            )
        return Selection(backend, f"backend {name} as asked: {backend.note}{_planned(device_type)}")
    refused: list[str] = []
    for candidate in AUTO_ORDER.get(device_type, ("reference",)):
        backend = get_backend(candidate)
        reason = _refusal(backend, device_type, precisions)
        if reason is None:
            others = f" (passed over: {'; '.join(refused)})" if refused else ""
            return Selection(backend, f"backend {candidate}: {backend.note}{others}{_planned(device_type)}")
        refused.append(f"{candidate}: {reason}")
    raise BackendError(f"backend: none can run on device {device_type!r}: {'; '.join(refused)}. Choose another recipe.")


def _planned(device_type: str) -> str:
    return f" (planned for {PLANNED}; not tried here)" if device_type == PLANNED else ""


def _refusal(backend: Backend, device_type: str, precisions: list[LinearPrecision]) -> str | None:
    if device_type == PLANNED:
        reason = None if backend.on_gpus else "it computes on the CPU"
    else:
        reason = backend.unavailable(device_type)
    if reason:
        return reason
    return next((reason for precision in precisions if (reason := backend.unsupported(precision))), None)
