"""Initial weights, a pure function of (seed, parameter path)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from fp8train.errors import ConfigError
from fp8train.models.decoder import Decoder

MOST_THREADS = 8  # each holds a matrix in FP32
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


def initialize(model: Decoder, seed: int) -> None:
    """Fill every parameter with its initial_values.

    Args:
        model: converted or not; on any device but meta.
        seed: any integer.

    Raises:
        ConfigError: a parameter is on the meta device.
    """
    fill(model, initial_values(model, seed))


@torch.no_grad()
def fill(model: Decoder, values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy values into the parameters of these paths.

    Raises:
        ConfigError: a parameter is on the meta device.
    """
    parameters = dict(model.named_parameters())
    for path, parameter in parameters.items():
        if parameter.is_meta:
            raise ConfigError(
                f"initialize: {path} is on the meta device; needs memory. Call model.to_empty(device=...) first."
            )
    for path, value in values:
        parameters[path].copy_(value)


def initial_values(model: Decoder, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, fp32 on the CPU) of each parameter: matrices from N(0, init_std^2), norms 1, biases 0.

    The projections that write to the residual stream (o_proj, down_proj) get init_std / sqrt(2 * num_layers), so that
    the stream's variance does not grow with depth. Each parameter has its own generator, seeded by its path, and is
    drawn on the CPU: the values do not depend on the device, on the order or number of modules, on the rank, or on
    whether the model was laid out on the meta device before. So as many are drawn at a time as torch has threads,
    8 at most.

    Args:
        model: on any device; only shapes are read. A tied weight comes once, as embed_tokens.weight.
        seed: any integer.

    Source: GPT-2 (Radford et al., 2019) 2.3 for the residual factor.
    """
    std = model.config.init_std
    residual_std = std / math.sqrt(2 * model.config.num_layers)
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()}

    def draw(path: str) -> torch.Tensor:
        values = torch.empty(shapes[path], dtype=torch.float32)
        if path.endswith(".bias") or values.dim() == 1:
            return values.fill_(0.0 if path.endswith(".bias") else 1.0)
        spread = residual_std if path.endswith(RESIDUAL_OUTPUTS) else std
        return values.normal_(0.0, spread, generator=_generator(seed, path))

    at_once = min(torch.get_num_threads(), MOST_THREADS)
    with ThreadPoolExecutor(at_once) as threads:
        for first in range(0, len(shapes), at_once):  # so that no more wait to be copied
            paths = list(shapes)[first : first + at_once]
            yield from zip(paths, threads.map(draw, paths), strict=True)


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
