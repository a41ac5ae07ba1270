"""Stand-ins for the vendors' packages: they compute on the CPU from the memory that the vendor's library reads."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fp8train.quant import reference
from fp8train.quant.formats import E4M3, QuantSpec


def spread(scale: Tensor, rows: int, cols: int, rows_per_scale: int) -> Tensor:
    """Scales [.., ..] repeated over their blocks to [rows, cols]."""
    return scale.repeat_interleave(rows_per_scale, 0)[:rows].repeat_interleave(128, 1)[:, :cols]


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, b_rows: int) -> Tensor:
    """FP32 product of codes [M, K] and [N, K] with logical scales."""
    left = a.float() * spread(a_scale, *a.shape, 1)
    right = b.float() * spread(b_scale, *b.shape, b_rows)
    return (left.double() @ right.double().T).float()


def scaled_mm(
    a: Tensor, b: Tensor, sa: Tensor, kind_a: Any, sb: Tensor, kind_b: Any, output_dtype: torch.dtype
) -> Tensor:
    """torch.nn.functional.scaled_mm with cuBLASLt's layouts: a row-major, b column-major, scales at fixed strides."""
    (M, K), N = a.shape, b.shape[1]
    assert a.stride() == (K, 1) and b.stride() == (1, K) and M % 4 == 0 and N % 16 == 0 and K % 16 == 0
    blocks = -(-K // 128)
    assert kind_a.name == "BlockWise1x128" and sa.shape == (M, blocks) and (blocks == 1 or sa.stride() == (1, M))
    if kind_b.name == "BlockWise128x128":
        padded = -(-blocks // 4) * 4
        assert sb.shape == (padded, -(-N // 128)) and sb.stride() == (1, padded)
        return product(a, sa, b.T, sb.T[:, :blocks], 128).to(output_dtype)
    assert sb.shape == (N, blocks) and (blocks == 1 or sb.stride() == (1, N))
    return product(a, sa, b.T, sb, 1).to(output_dtype)


def deep_gemm() -> ModuleType:
    """deep_gemm 2.x: fp8_gemm_nt((a, sa), (b, sb), d, c, recipe)."""

    def fp8_gemm_nt(
        a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, *,
        c: Tensor | None, recipe: tuple[int, int, int], disable_ue8m0_cast: bool,
    ) -> None:  # fmt: skip
        assert disable_ue8m0_cast and a[0].is_contiguous() and b[0].is_contiguous() and d.is_contiguous()
        assert a[1].stride(0) == 1 and a[1].shape[0] % 4 == 0, "scales are read by TMA, M-major, 16 bytes at a time"
        assert recipe in ((1, 128, 128), (1, 1, 128))
        if recipe[1] == 128:
            assert d.dtype is torch.bfloat16 and c is None
        else:
            assert d.dtype is torch.float32 and c is d
        made = product(*a, *b, recipe[1])
        d.copy_(made if c is None else c + made)

    module = ModuleType("deep_gemm")
    module.fp8_gemm_nt = fp8_gemm_nt  # type: ignore[attr-defined]
    return module


def torchao_kernels() -> ModuleType:
    """torchao 0.14 to 0.18: two GEMMs that load scales for whole tiles of 256 without a mask, and mask K once only."""

    def loaded(scale: Tensor, size: list[int]) -> Tensor:
        """Raises where the storage ends before the tile does."""
        assert scale.dtype is torch.float32
        return scale.as_strided(size, scale.stride(), scale.storage_offset())

    def gemm(
        a: Tensor, b: Tensor, a_s: Tensor, b_s: Tensor, block_size: int, out_dtype: torch.dtype, b_rows: int
    ) -> Tensor:
        (M, K), N = a.shape, b.shape[1]
        assert b.shape[0] == K and block_size == 128 and K % 128 == 0, "beyond K the last block is not masked"
        assert a.dtype is b.dtype is E4M3.dtype and a.stride(1) == 1 and b.stride(0) == 1 and a_s.stride(0) == 1
        scale_a = loaded(a_s, [-(-M // 256) * 256, K // 128])[:M]
        scale_b = loaded(b_s, [K // 128, -(-N // 256) * 256 // b_rows])
        return product(a, scale_a, b.T, scale_b.T[: -(-N // b_rows)], b_rows).to(out_dtype)

    def triton_fp8_gemm_1x128_128x128(
        a: Tensor, b: Tensor, a_s: Tensor, b_s: Tensor, block_size: int = 128, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        assert b_s.stride(0) == 1
        return gemm(a, b, a_s, b_s, block_size, out_dtype, 128)

    def triton_fp8_gemm_1x128_128x1(
        a: Tensor, b: Tensor, a_s: Tensor, b_s: Tensor, block_size: int = 128, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        assert b_s.stride(1) == 1
        return gemm(a, b, a_s, b_s, block_size, out_dtype, 1)

    module = ModuleType("torchao.prototype.blockwise_fp8_training.kernels")
    module.triton_fp8_gemm_1x128_128x128 = triton_fp8_gemm_1x128_128x128  # type: ignore[attr-defined]
    module.triton_fp8_gemm_1x128_128x1 = triton_fp8_gemm_1x128_128x1  # type: ignore[attr-defined]
    return module


class BlockTensor(SimpleNamespace):
    """Float8BlockwiseQTensor: constructor arguments as attributes, with the leading underscore of the data."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{f"_{name}": value for name, value in fields.items()})


class BlockQuantizer:
    """Float8BlockQuantizer, by the definition, in GEMM-ready layouts: 1D scales [K/128, M], both padded to fours."""

    def __init__(
        self, fp8_dtype: str, *, rowwise: bool, columnwise: bool, amax_epsilon: float, force_pow_2_scales: bool,
        block_scaling_dim: int,
    ) -> None:  # fmt: skip
        assert fp8_dtype == "e4m3" and amax_epsilon == 0.0
        self.copies = {"rowwise": rowwise, "columnwise": columnwise}
        kind = "pow2" if force_pow_2_scales else "fp32"
        self.spec = QuantSpec(E4M3, (128, 128) if block_scaling_dim == 2 else (1, 128), kind)  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> BlockTensor:
        assert x.is_contiguous()
        fields: dict[str, Any] = {}
        for name, wanted in self.copies.items():
            q = reference.quantize(x, self.spec, transpose=name == "columnwise")
            scale = q.scale_inv if self.spec.block == (128, 128) else q.scale_inv.T
            padded = torch.full((scale.shape[0], -(-scale.shape[1] // 4) * 4), float("nan"))
            padded[:, : scale.shape[1]] = scale
            fields[f"{name}_data"] = q.qdata.view(torch.uint8) if wanted else None
            fields[f"{name}_scale_inv"] = padded if wanted else None
        return BlockTensor(**fields)


def general_gemm(A: BlockTensor, B: BlockTensor, workspace: Tensor, out_dtype: torch.dtype, *, layout: str,
                 use_split_accumulator: bool) -> tuple[Tensor, None, None, None]:  # fmt: skip
    """TransformerEngine's GEMM: column-major, so the result is B @ A.T for layout TN."""
    assert layout == "TN" and use_split_accumulator and workspace.dtype is torch.uint8 and not B._is_2D_scaled
    left, right = (tensor._rowwise_data.view(E4M3.dtype) for tensor in (B, A))
    for tensor in (A, B):
        assert tensor._rowwise_data.is_contiguous() and tensor._rowwise_scale_inv.is_contiguous()
        assert tensor._rowwise_scale_inv.shape[1] % 4 == 0
    blocks = -(-left.shape[1] // 128)
    a_scale = B._rowwise_scale_inv.T
    b_scale = A._rowwise_scale_inv[:, :blocks] if A._is_2D_scaled else A._rowwise_scale_inv.T
    made = product(left, a_scale, right, b_scale, 128 if A._is_2D_scaled else 1)
    return made.to(out_dtype), None, None, None


def transformer_engine() -> dict[str, ModuleType]:
    """The modules of TransformerEngine that the backend imports, by name."""
    names = [
        "transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.tensor",
        "transformer_engine.pytorch.tensor.float8_blockwise_tensor", "transformer_engine.pytorch.cpp_extensions",
        "transformer_engine.pytorch.cpp_extensions.gemm", "transformer_engine_torch",
    ]  # fmt: skip
    modules = {name: ModuleType(name) for name in names}
    modules["transformer_engine_torch"].DType = SimpleNamespace(kFloat8E4M3="e4m3")  # type: ignore[attr-defined]
    tensors = modules["transformer_engine.pytorch.tensor.float8_blockwise_tensor"]
    tensors.Float8BlockQuantizer, tensors.Float8BlockwiseQTensor = BlockQuantizer, BlockTensor  # type: ignore[attr-defined]
    modules["transformer_engine.pytorch.cpp_extensions.gemm"].general_gemm = general_gemm  # type: ignore[attr-defined]
    return modules
