"""Imports point one way. A module imports from its own layer and those before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from fp8train.cli import COMMANDS
from tests.source_tree import ROOT, imports, python_files, syntax

LAYERS = (
    {"errors", "_layout", "units", "arguments", "shards", "spikes", "whole_file"},
    {"quant"},
    {"backends"},
    {"nn"},
    {"recipe_document", "recipe_options", "recipe"},
    {"replaceable", "unreached", "conversion_report", "convert", "live_report", "functional", "hf_fp8"},
    {"telemetry"},
    {"models", "data", "optim", "distributed"},
    {"config_sections", "config"},
    {"metrics", "checkpoint"},
    {"trainer"},
    {"report", "checkup"},
    {"comparison"},
    {"benchmarks", "calibration", "calibration_setup"},
    set(COMMANDS),
    {"cli"},
    {"__main__"},
)
PLAIN_PYTORCH = {"models", "data", "optim", "distributed"}

SOURCES = [path for path in python_files("fp8train") if path != Path("fp8train/__init__.py")]


def part_of(path: Path) -> str:
    """fp8train/nn/linear.py -> "nn", fp8train/recipe.py -> "recipe"."""
    return path.parts[1].removesuffix(".py")


PLAIN_SOURCES = [path for path in SOURCES if part_of(path) in PLAIN_PYTORCH]
RANK = {part: number for number, layer in enumerate(LAYERS) for part in layer}


def imported_parts(path: Path) -> set[str]:
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == "fp8train" and len(name) > 1 and name[1] != "kernels"}


def code_words(path: Path) -> Iterator[str]:
    """Names, attributes and strings of a file, without its docstrings."""
    prose = {id(node.value) for node in ast.walk(syntax(path)) if isinstance(node, ast.Expr)}
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        for field in ("id", "attr", "name", "arg"):
            if isinstance(getattr(node, field, None), str):
                yield getattr(node, field)


def test_every_module_has_a_layer() -> None:
    there = {part_of(path) for path in SOURCES}
    assert there == set(RANK), "give a module its layer, or take it out, in LAYERS of this file"


def test_imports_come_from_the_same_layer_or_those_before_it() -> None:
    upward = [
        f"{path} imports {part}"
        for path in SOURCES
        for part in sorted(imported_parts(path))
        if RANK.get(part, 0) > RANK.get(part_of(path), len(LAYERS))
    ]
    assert not upward


def test_no_command_imports_another() -> None:
    """What two of them need is no command: it belongs to a layer below."""
    crossing = [
        f"{path} imports {part}"
        for path in SOURCES
        if part_of(path) in COMMANDS
        for part in sorted(imported_parts(path) & set(COMMANDS) - {part_of(path)})
    ]
    assert not crossing


def test_models_data_optim_and_distributed_are_plain_pytorch() -> None:
    """They see the foundations, themselves, and of one another only the config dataclasses."""
    foreign = []
    for path in PLAIN_SOURCES:
        for name in imports(path):
            package, *rest = name.split(".")
            own = package != "fp8train" or rest[0] in LAYERS[0] | {part_of(path)}
            if not own and not (rest[0] in PLAIN_PYTORCH and rest[1:2] == ["config"]):
                foreign.append(f"{path} imports {name}")
    assert not foreign


def test_models_data_optim_and_distributed_do_not_know_of_fp8() -> None:
    """Not in a name or a string; prose may say what conversion does to them."""
    words = re.compile(r"(?i)fp8(?!train)|float8|e4m3|e5m2")
    found = [f"{path}: {word}" for path in PLAIN_SOURCES for word in code_words(path) if words.search(word)]
    assert not found, "precision is the business of nn/ and convert"


def test_only_backends_reach_the_kernels_and_vendor_libraries() -> None:
    reserved = re.compile(r"(fp8train\.kernels|triton|transformer_engine|deep_gemm|torchao)(\.|$)")
    reached = [f"{path} imports {name}" for path in SOURCES for name in imports(path) if reserved.match(name)]
    assert not [line for line in reached if not line.startswith("fp8train/backends/")]


def test_kernels_import_torch_triton_math_types_and_each_other_only() -> None:
    allowed = re.compile(r"(torch|triton|math|collections\.abc|dataclasses|typing|__future__|fp8train\.kernels)(\.|$)")
    used = [f"{path} imports {name}" for path in python_files("kernels") for name in imports(path)]
    assert not [line for line in used if not allowed.match(line.split()[-1])]


def test_nothing_imports_a_package_called_kernels() -> None:
    """Ours are fp8train.kernels. Strings that other processes run, as in test_packaging.py, are no imports of ours."""
    everything = python_files("fp8train", "kernels", "tests")
    assert not [path for path in everything if any(name.split(".")[0] == "kernels" for name in imports(path))]


def test_folders_beside_the_package_are_no_packages() -> None:
    for name in ("kernels", "configs", "recipes"):
        assert not (ROOT / name / "__init__.py").exists(), (
            f"{name}/__init__.py would shadow another package of that name"
        )


def test_layering_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    source = tmp_path / "inner.py"
    source.write_text("def f():\n    from fp8train.trainer import Trainer\n    return Trainer\n")
    assert imports(source) == {"fp8train.trainer.Trainer"}
