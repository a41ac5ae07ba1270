"""Where the folders beside the package lie: kernels/, configs/ and recipes/.

In a checkout they are top-level folders; in a wheel they are installed inside the package. Either way they are imported and loaded
only as fp8train.kernels, fp8train.configs and fp8train.recipes, so that nothing of ours shadows the PyPI package `kernels`.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() and (PACKAGE.parent / "kernels").is_dir() else None


def folder(name: str) -> Path:
    """The folder `name` ("kernels", "configs" or "recipes"), in a checkout or in an installed wheel."""
    return (CHECKOUT or PACKAGE) / name
