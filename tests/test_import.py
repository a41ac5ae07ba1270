"""`import fp8train` is quick, and neither it nor the modules below it need what is optional."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fp8train
from tests.source_tree import ROOT, python_files

OPTIONAL = [
    "datasets",
    "tensorboard",
    "tokenizers",
    "torchao",
    "transformer_engine",
    "transformers",
    "triton",
    "wandb",
]
MODULES = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in python_files("fp8train")]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_three_seconds_and_loads_no_torch() -> None:
    """Of its own CPU time: others may keep the machine busy."""
    loaded, seconds = run("import sys, time, fp8train; print('torch' in sys.modules, time.process_time())").split()
    assert loaded == "False" and float(seconds) < 3.0


def test_every_module_imports_without_the_optional_packages() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    modules = [name for name in MODULES if not name.endswith("__main__")]
    run(blocked + "from importlib import import_module\n" + f"for name in {modules}: import_module(name)")


@pytest.mark.parametrize("name", fp8train.__all__)
def test_public_name_is_there_and_says_what_it_does(name: str) -> None:
    assert getattr(fp8train, name).__doc__
    assert name in dir(fp8train)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = fp8train.quantise


def test_kernels_configs_and_recipes_are_parts_of_the_package() -> None:
    run("import fp8train.kernels, fp8train.configs, fp8train.recipes; print(fp8train.recipes.__path__)")
    assert (
        run("import importlib.util; import fp8train; print(importlib.util.find_spec('fp8train.tests'))").strip()
        == "None"
    )
