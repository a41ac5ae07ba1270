"""Initial weights, a pure function of (seed, parameter path)."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import torch

from fp8train.errors import ConfigError
from fp8train.models.decoder import Decoder

MOST_THREADS = 16  # each holds a matrix in FP32
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


def initialize(model: Decoder, seed: int) -> None:
    """Fill every parameter: matrices from N(0, init_std^2), norms 1, biases 0.

    The projections that write to the residual stream (o_proj, down_proj) get init_std / sqrt(2 * num_layers), so that
    the stream's variance does not grow with depth. Each parameter has its own generator, seeded by its path, and is
    drawn on the CPU: the values do not depend on the device, on the order or number of modules, on the rank, or on
    whether the model was laid out on the meta device before. So as many are drawn at a time as torch has threads,
    16 at most (0.285e9 numbers, two cores: 1.1 s; one after the other 2.1 s).

    Args:
        model: converted or not; on any device but meta.
        seed: any integer.

    Raises:
        ConfigError: a parameter is on the meta device.

    Source: GPT-2 (Radford et al., 2019) 2.3 for the residual factor.
    """
    std = model.config.init_std
    residual_std = std / math.sqrt(2 * model.config.num_layers)
    parameters = list(model.named_parameters())  # a tied weight comes once, as embed_tokens.weight
    for path, parameter in parameters:
        if parameter.is_meta:
            raise ConfigError(
                f"initialize: {path} is on the meta device; needs memory. Call model.to_empty(device=...) first."
            )

    @torch.no_grad()  # of a thread
    def fill(path: str, parameter: torch.Tensor) -> None:
        if path.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            values.normal_(
                0.0, residual_std if path.endswith(RESIDUAL_OUTPUTS) else std, generator=_generator(seed, path)
            )
            parameter.copy_(values)

    with ThreadPoolExecutor(min(torch.get_num_threads(), MOST_THREADS)) as threads:
        list(threads.map(fill, *zip(*parameters, strict=True)))


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
