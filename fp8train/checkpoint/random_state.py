"""State of every random generator of this process, as text."""

from __future__ import annotations

import base64
import json
import random

import numpy as np
import torch


def random_state() -> dict[str, str]:
    """State of the generators of Python, NumPy, torch and, where there is a GPU in use, its device."""
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state()  # noqa: NPY002
    states = {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([numpy_name, [int(key) for key in numpy_keys], *numpy_rest]),
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return states


def restore_random_state(states: dict[str, str]) -> None:
    """Put the generators back as random_state() found them; a GPU's state is left out where there is no GPU."""
    version, internal, gauss = json.loads(states["python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = json.loads(states["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
