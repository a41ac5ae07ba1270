"""Where kernels/, configs/ and recipes/ lie, and how they become sub-packages of fp8train.

In a checkout they are top-level folders; a wheel installs them inside the package. None has an __init__.py, so that
`import kernels` from the repository root still finds the PyPI package of that name.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

FOLDERS = ("kernels", "configs", "recipes")
PACKAGE = Path(__file__).resolve().parent
CHECKOUT = None if (PACKAGE / "recipes").is_dir() else PACKAGE.parent


def folder(name: str) -> Path:
    """The folder `name` ("kernels", "configs" or "recipes"), in a checkout or in an installed wheel."""
    return (CHECKOUT or PACKAGE) / name


def mount() -> None:
    """Make the three folders of a checkout importable as sub-packages of fp8train; a wheel needs no help.

    They are entered one by one: extending fp8train.__path__ by the repository root would also make fp8train.tests and a
    second copy of the package, fp8train.fp8train, importable.
    """
    if CHECKOUT is None:
        return
    for name in FOLDERS:
        spec = PathFinder.find_spec(f"fp8train.{name}", [str(CHECKOUT)])
        if spec is None:
            raise ImportError(f"fp8train: {CHECKOUT} has no folder {name}/; needs the whole checkout. Restore it.")
        sys.modules[spec.name] = module = module_from_spec(spec)
        setattr(sys.modules["fp8train"], name, module)
