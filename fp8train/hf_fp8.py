"""FP8 weights in a Hugging Face folder: E4M3 codes, and beside each weight the scale_inv of its blocks.

The format that DeepSeek-V3 was published in (`quant_method: fp8` with `weight_block_size` in config.json), which is how
a weight is rounded here for fprop: what training multiplied is what the folder holds, bit for bit, and what serves it
quantises activations by itself (`activation_scheme: dynamic`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fp8train.errors import ConfigError
from fp8train.functional import quantize
from fp8train.quant.formats import E4M3, LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor

METHOD = "fp8"
BLOCK = (128, 128)
REMEDY = "Give recipe=blockwise, or export with dtype=bfloat16."


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPacking:
    """How a folder stores weights as codes and scales; fp8train.models.Packing.

    Args:
        block: rows and columns of a weight that share a scale.
        specs: of the parameters to write in this way, by name.
        left: module paths, as the folder has them, of the linears that are written as they are.
    """

    block: tuple[int, int] = BLOCK
    specs: Mapping[str, QuantSpec] = field(default_factory=dict)
    left: Sequence[str] = ()

    dtype = "F8_E4M3"
    suffix = "_scale_inv"

    @property
    def document(self) -> dict[str, Any]:
        """quantization_config of config.json."""
        return {
            "quant_method": METHOD,
            "fmt": E4M3.name,
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.block),
            "modules_to_not_convert": list(self.left),
        }

    def packed_bytes(self, name: str, shape: Sequence[int]) -> int | None:
        """Bytes of codes and scales of a parameter; None where it is written as it is."""
        if name not in self.specs:
            return None
        scale_rows, scale_cols = self.scales_shape(shape)
        return shape[0] * shape[1] + 4 * scale_rows * scale_cols

    def pack(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Codes [N, K] and scale_inv [ceil(N/128), ceil(K/128)] fp32, by what is added to the parameter's name."""
        spec = self.specs[name]
        q = quantize(weight.float(), block=spec.block, fmt=spec.format.name, scale=spec.scale)
        return {"": q.qdata, self.suffix: q.scale_inv}

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Of a weight [N, K]."""
        return QuantSpec(E4M3, self.block).scale_shape(shape[0], shape[1])

    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """codes * scales, fp32 [N, K]: exact where scales are powers of two, else rounded once."""
        return QTensor(codes, scales.float(), QuantSpec(E4M3, self.block, "fp32")).dequantize()


def packing_of(document: Mapping[str, Any], directory: str | Path) -> BlockPacking | None:
    """How the folder with that config.json stores its linears; None where it does not say that they are quantised.

    Args:
        document: the parsed config.json.
        directory: the folder, for errors.

    Raises:
        ConfigError: in another way than E4M3 codes with a scale for each block.
    """
    stored = document.get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, Mapping):
        raise ConfigError(f"{directory}: quantization_config is {stored!r}; needs an object. Fetch the folder again.")
    method, fmt, block = stored.get("quant_method"), stored.get("fmt") or E4M3.name, stored.get("weight_block_size")
    sizes = block if isinstance(block, list) and len(block) == 2 else [0]
    if method != METHOD or fmt != E4M3.name or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ConfigError(
            f"{directory}: the weights are quantised (quant_method {method!r}, fmt {fmt!r}, "
            f"weight_block_size {block!r}); needs BF16, FP16, FP32, or quant_method {METHOD!r} with fmt "
            f"{E4M3.name!r} and a weight_block_size of two sizes. Take the unquantised model."
        )
    return BlockPacking(block=(sizes[0], sizes[1]))


def packed_specs(
    precisions: Mapping[str, LinearPrecision], shapes: Mapping[str, Sequence[int]], recipe: str
) -> dict[str, QuantSpec]:
    """Spec of each weight that fprop multiplies in FP8, by module path; every one must be one that the format holds.

    Args:
        precisions: of every linear, by module path.
        shapes: of their weights; one that the model has under another name too is left out.
        recipe: its name, for errors.

    Raises:
        ConfigError: no linear is in FP8, or a weight is rounded in another way, is shared or has a ragged side.
    """
    specs = {fqn: p.fprop.right for fqn, p in precisions.items() if p.fprop.left is not None and p.fprop.right}
    if not specs:
        raise ConfigError(f"dtype=fp8: {recipe} has no linear in FP8 here; needs one. {REMEDY}")
    for fqn, spec in specs.items():
        if spec.format is not E4M3 or spec.block != BLOCK:
            raise ConfigError(f"dtype=fp8: {recipe} rounds the weight of {fqn} as {spec}; needs e4m3 128x128. {REMEDY}")
        if fqn not in shapes:
            raise ConfigError(
                f"dtype=fp8: the weight of {fqn} is that of the embedding too, which is no linear; needs one of its "
                "own. Export with dtype=bfloat16, or give a recipe that leaves it in bf16."
            )
        if any(size > side and size % side for size, side in zip(shapes[fqn], BLOCK, strict=True)):
            raise ConfigError(
                f"dtype=fp8: the weight of {fqn} is {list(shapes[fqn])}; needs sides up to 128 or multiples of it, "
                "since other readers of this format take the blocks of a ragged side to be smaller. Export with "
                "dtype=bfloat16."
            )
    return specs
