"""Initial weights, a pure function of (seed, parameter path)."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import torch

from fp8train.errors import ConfigError
from fp8train.models.decoder import Decoder

MOST_THREADS = 8  # each holds a matrix in FP32
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Fill every parameter: matrices from N(0, init_std^2), norms 1, biases 0.

    The projections that write to the residual stream (o_proj, down_proj) get init_std / sqrt(2 * num_layers), so that
    the stream's variance does not grow with depth. Each parameter has its own generator, seeded by its path, and is
    drawn on the CPU: the values do not depend on the device, on the order or number of modules, on the rank, or on
    whether the model was laid out on the meta device before. So as many are drawn at a time as torch has threads,
    8 at most.

    Args:
        model: converted or not; on any device but meta.
        seed: any integer.

    Raises:
        ConfigError: a parameter is on the meta device.

    Source: GPT-2 (Radford et al., 2019) 2.3 for the residual factor.
    """
    std = model.config.init_std
    residual_std = std / math.sqrt(2 * model.config.num_layers)
    matrices = {}
    for path, parameter in model.named_parameters():  # a tied weight comes once, as embed_tokens.weight
        if parameter.is_meta:
            raise ConfigError(
                f"initialize: {path} is on the meta device; needs memory. Call model.to_empty(device=...) first."
            )
        if path.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            matrices[path] = parameter

    def draw(path: str) -> torch.Tensor:
        values = torch.empty(matrices[path].shape, dtype=torch.float32)
        spread = residual_std if path.endswith(RESIDUAL_OUTPUTS) else std
        return values.normal_(0.0, spread, generator=_generator(seed, path))

    at_once = min(torch.get_num_threads(), MOST_THREADS)
    with ThreadPoolExecutor(at_once) as threads:
        for first in range(0, len(matrices), at_once):  # so that no more wait to be copied
            paths = list(matrices)[first : first + at_once]
            for path, values in zip(paths, threads.map(draw, paths), strict=True):
                matrices[path].copy_(values)


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
