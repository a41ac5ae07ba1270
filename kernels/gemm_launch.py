"""Launcher of both GEMMs: their kernels and entries are in gemm.py and gemm_wgrad.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.gemm_tile import FP8, TILE_ORDER, multiprocessors, scale_rows, tma_reads
from fp8train.kernels.launch import READY, SIZE_LIMIT, first_launch, overlaps, properties

ARGUMENTS = ("a", "b", "out", "a_scale", "b_scale", "bias")  # the tensors of a launch
POINTERS = ("a_ptr", "b_ptr", "c_ptr", "a_scale_ptr", "b_scale_ptr", "bias_ptr")  # what the kernels call them
BIAS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One of the two operations.

    Args:
        name: of its file.
        b_rows: rows of b that share a scale, 128 or 1.
        out_dtypes: of its result.
        configs: its launch entries.
        plain: the entries that are always right: the first where TMA can read the strides.
        pointer_kernel, tma_kernel: jitted.
    """

    name: str
    b_rows: int
    out_dtypes: tuple[torch.dtype, ...]
    configs: Mapping[str, Mapping[str, Any]]
    plain: tuple[str, ...]
    pointer_kernel: Any
    tma_kernel: Any

    def __call__(
        self, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor | None,
        out_dtype: torch.dtype, accumulate: bool, config: str | None,
    ) -> Tensor:  # fmt: skip
        """out = a @ b.T + bias, or out += a @ b.T; see gemm and gemm_wgrad."""
        key = (self.name, config, accumulate, out_dtype, *properties(a, b, out, a_scale, b_scale, bias))
        ready = READY.get(key)
        if ready is None:
            self._check(a, b, a_scale, b_scale, bias, out, out_dtype if out is None else out.dtype)
        if out is None:
            out = torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)
        else:
            self._check_apart(out, (a, b, None, a_scale, b_scale, bias))
        if ready is not None:
            ready(a, b, out, a_scale, b_scale, bias)
        elif 0 in (*a.shape, b.shape[0]):
            return self._empty(out, bias, accumulate)
        else:
            self._launch(key, a, b, a_scale, b_scale, bias, out, accumulate, config)
        return out

    def refusal(self, config: str, a: Tensor, b: Tensor, b_scale: Tensor) -> str | None:
        """Why an entry cannot multiply these operands, or None."""
        if config not in self.configs:
            return f"config is {config!r}; needs one of {', '.join(self.configs)}"
        if config.startswith("pointer"):
            return None
        by_hand = "MATH_GROUPS" in self.configs[config]
        if by_hand and capability(a.device)[0] != 9:
            return f"config {config!r} is Gluon for Hopper, which no CPU interprets; needs a GPU of sm_90"
        if a.is_cuda and capability(a.device) < (9, 0):
            return f"config {config!r} uses TMA; needs sm_90"
        if not (tma_reads(a) and tma_reads(b)):
            return f"config {config!r} reads by TMA; needs rows that start at multiples of 16 bytes"
        if by_hand and self.b_rows == 1 and not tma_reads(scale_rows(b_scale)):
            return (
                f"config {config!r} reads b_scale by TMA; needs N contiguous, from a multiple of 16 bytes to the next"
            )
        if b.shape[0] % self.columns_multiple(config) != 0:
            return f"config {config!r} reads rows of b by 16; needs N that is a multiple of 16, got {b.shape[0]}"
        return None

    def columns_multiple(self, config: str) -> int:
        """What N must be a multiple of for an entry."""
        return 16 if self.configs.get(config, {}).get("AHEAD") else 1

    def _launch(
        self, key: Any, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor,
        accumulate: bool, config: str | None,
    ) -> None:  # fmt: skip
        """Pick the entry, if config is None, and launch it the first time with such operands."""
        name = config or next(name for name in self.plain if self.refusal(name, a, b, b_scale) is None)
        if reason := self.refusal(name, a, b, b_scale):
            raise ValueError(f"{self.name}: {reason}. Leave config=None.")
        entry = self.configs[name]
        operands = (a, b, out, a_scale, b_scale, bias)
        if "MATH_GROUPS" in entry:
            from fp8train.kernels import gemm_gluon_launch  # experimental in Triton: the other entries do without it

            gemm_gluon_launch.launch(key, *operands, entry, self.b_rows, accumulate)
            return
        (M, K), N = a.shape, b.shape[0]
        constants = {name: value for name, value in entry.items() if name.isupper()}
        grid = -(-M // constants["BLOCK_M"]) * -(-N // constants["BLOCK_N"])
        kernel = self.pointer_kernel
        if "WARP_SPECIALIZE" in constants:
            kernel, grid = self.tma_kernel, min(grid, multiprocessors(a.device))
            constants["TMA_STORE"] = out.dtype is torch.bfloat16 and tma_reads(out)
        arguments = dict(zip(POINTERS, operands, strict=True)) | {
            "M": M, "N": N, "K": K, "stride_am": a.stride(0), "stride_bn": b.stride(0), "stride_cm": out.stride(0),
            "stride_sam": a_scale.stride(0), "stride_sak": a_scale.stride(1), "stride_sbn": b_scale.stride(0),
            "stride_sbk": b_scale.stride(1), "BIAS": bias is not None, "ACCUMULATE": accumulate,
            **TILE_ORDER, **constants,
        }  # fmt: skip
        tensors = {name: number for number, name in enumerate(POINTERS) if name in kernel.arg_names}
        options = {name: value for name, value in entry.items() if name.islower()}
        first_launch(key, kernel, (grid,), arguments, tensors, a.device, enable_fp_fusion=True, **options)

    def _empty(self, out: Tensor, bias: Tensor | None, accumulate: bool) -> Tensor:
        """The result where some dimension is 0."""
        if accumulate:
            return out
        return out.zero_() if bias is None else out.copy_(bias.expand(out.shape))

    def _check(
        self, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor | None,
        out_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Raise ValueError unless the operands fit each other."""
        for name, x in (("a", a), ("b", b)):
            if x.dim() != 2 or x.dtype not in FP8:
                got, wanted = f"{list(x.shape)} {x.dtype}", "a matrix in float8_e4m3fn or float8_e5m2"
                raise ValueError(f"{self.name}: {name} is {got}; needs {wanted}. Quantise it.")
            self._check_rows(name, x)
        (M, K), (N, b_K) = a.shape, b.shape
        if b_K != K or b.device != a.device:
            got, wanted = f"{[N, b_K]} on {b.device}", f"[N, {K}] on {a.device}, the K and the device of a {[M, K]}"
            raise ValueError(f"{self.name}: b is {got}; needs {wanted}. Pass operands of one product.")
        if max(M, N, K) >= SIZE_LIMIT:
            wanted = "each below 2^31 - 4096"
            raise ValueError(f"{self.name}: M, N, K are {M}, {N}, {K}; needs {wanted}. Split the operand.")
        blocks = -(-K // 128)
        shapes = {"a_scale": (M, blocks), "b_scale": (-(-N // self.b_rows), blocks), "bias": (N,), "out": (M, N)}
        for (name, shape), x in zip(shapes.items(), (a_scale, b_scale, bias, out), strict=True):
            if x is not None and (x.shape != shape or x.device != a.device):
                got, wanted = f"{list(x.shape)} on {x.device}", f"{list(shape)} on {a.device}"
                remedy = f"Pass what quantising {name[0]} gave" if name.endswith("scale") else "Reshape or move it"
                raise ValueError(f"{self.name}: {name} is {got}; needs {wanted}. {remedy}.")
            if name.endswith("scale") and x.dtype is not torch.float32:
                raise ValueError(f"{self.name}: {name} is {x.dtype}; needs torch.float32. Cast it.")
        if out_dtype not in self.out_dtypes:
            wanted = " or ".join(map(str, self.out_dtypes))
            raise ValueError(f"{self.name}: out is {out_dtype}; needs {wanted}. Cast what comes of one of them.")
        if bias is not None and (bias.dtype not in BIAS_DTYPES or not bias.is_contiguous()):
            wanted = f"{' or '.join(map(str, BIAS_DTYPES))}, contiguous"
            got = f"{bias.dtype} with strides {bias.stride()}"
            raise ValueError(f"{self.name}: bias is {got}; needs {wanted}. Cast it, or call .contiguous().")
        if out is not None:
            self._check_rows("out", out)
            if out.stride(0) < N and M > 1:
                got, wanted = f"strides {out.stride()}, rows of {N} that share memory", f"the first to be {N} or more"
                raise ValueError(f"{self.name}: out has {got}; needs {wanted}. Pass a matrix with memory for each row.")

    def _check_rows(self, name: str, x: Tensor) -> None:
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(
                f"{self.name}: {name} has strides {x.stride()}; needs the last to be 1. Call .contiguous()."
            )

    def _check_apart(self, out: Tensor, operands: tuple[Tensor | None, ...]) -> None:
        """Raise ValueError if out shares memory with an operand: depends on addresses, so every call asks."""
        met = overlaps(out, operands)
        if met is not None:
            raise ValueError(
                f"{self.name}: out shares memory with {ARGUMENTS[met]}; needs memory of its own. Allocate another."
            )


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
