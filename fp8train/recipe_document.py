"""Strict reading of a YAML document: each key once, no unknown key, and errors that say where."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fp8train.errors import RecipeError, one_of


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> object:
    """The document in a YAML file.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8 or not YAML, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {str(path)!r} does not exist; needs a YAML file. Correct the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {str(path)!r}: {error}; needs a readable UTF-8 file. Correct the path.") from error
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds plain data only
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise RecipeError(
            f"{path.name}:{line} {error.problem}; needs YAML with each key once and patterns in single quotes "
            "('*lm_head'). Correct the line."
        ) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise RecipeError(f"{path.name}: {' '.join(str(error).split())}; needs YAML. Save it as text.") from error


def mapping(value: object, where: str, allowed: Iterable[str] | None) -> dict[str, Any]:
    """`value` as a dict; `where` names it in errors.

    Raises:
        RecipeError: it is no mapping, or has a key outside `allowed` (None allows any text).
    """
    if not isinstance(value, Mapping):
        keys = ", ".join(allowed) if allowed is not None else "names as keys"
        raise RecipeError(f"{where} is {value!r}; needs a mapping with {keys}. Correct it.")
    for key in value:
        if not isinstance(key, str):
            raise RecipeError(f"{where}: key {key!r} is of type {type(key).__name__}; needs text. Put it in quotes.")
        if allowed is not None and key not in allowed:
            raise RecipeError(f"{where}: key {key!r} is unknown; {one_of(key, list(allowed))}. Correct it.")
    return dict(value)


def string(value: object, where: str, wanted: str) -> str:
    """`value` as text that is not empty.

    Raises:
        RecipeError: it is anything else; `wanted` says what belongs there.
    """
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{where} is {value!r}; needs {wanted}. Correct it.")
    return value
