"""The Gluon entries of the GEMMs as launched on aligned operands, for the tests that compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp8train.kernels.gemm_gluon import BOX_M, _gemm_gluon_kernel
from fp8train.kernels.gemm_gluon_launch import box_layout, registers


def compile_cases(operation: str, configs: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Their Gluon entries as launched on aligned operands: (name, kernel, signature, constexprs, options)."""
    scalars = ("M", "N", "K", "stride_cm", "stride_sak", "stride_sbk")
    signature = {"c_ptr": "*fp32", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"} | dict.fromkeys(scalars, "i32")
    signature |= {"group_m": "i32"}
    if operation == "gemm":
        signature |= {"stride_sbn": "i32"}
        outputs = {"bf16": {"c_ptr": "*bf16", "c_desc": ("bf16", BOX_M.value, 128)}, "fp32 bias": {"bias_ptr": "*fp32"}}
        flags = {"B_ROWS": 128, "ACCUMULATE": False}
    else:
        outputs = {"": {"b_scale_desc": ("fp32", 1, 128)}}
        flags = {"B_ROWS": 1, "ACCUMULATE": True, "stride_sbn": 1}
    cases = []
    for name, entry in configs.items():
        if "MATH_GROUPS" not in entry:
            continue
        for output, types in outputs.items():
            boxes = {"a_desc": ("fp8e4nv", BOX_M.value, 128), "b_desc": ("fp8e4nv", entry["BLOCK_N"], 128)} | types
            made = signature | {key: kind if isinstance(kind, str) else box_type(*kind) for key, kind in boxes.items()}
            if entry["AHEAD"]:
                layout = box_layout(entry["BLOCK_N"], 1, rank=5)
                made["b_desc"] = f"tensordesc<fp8e4nv[{entry['BLOCK_N'] // 16}, 4, 1, 2, 128],{layout!r}>"
            constants = entry | registers(entry) | flags | {"stride_sam": 1, "BIAS": "bias_ptr" in types}
            constants = {key: value for key, value in constants.items() if key != "GROUP_M"}
            options = {"gluon": True, "num_warps": 4, "enable_fp_fusion": True, "odd": ("M", "K", "group_m")}
            cases.append((f"{operation} {name} {output}".rstrip(), _gemm_gluon_kernel, made, constants, options))
    return cases


def box_type(kind: str, rows: int, cols: int) -> str:
    size = {"fp8e4nv": 1, "bf16": 2, "fp32": 4}[kind]
    return f"tensordesc<{kind}[{rows}, {cols}],{box_layout(rows, size)!r}>"
