"""Typed configuration: dataclasses hold types and defaults, YAML under configs/ holds what differs, the command line has the last word."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from fp8train.errors import ConfigError

T = TypeVar("T")


def parse_arguments(argv: Sequence[str], arguments: type[T]) -> T:
    """Read `key=value` arguments into a dataclass; for commands whose arguments are not a whole run configuration.

    Args:
        argv: such as ["checkpoint=DIR", "tokens=64"]; nested keys are dotted; -h or --help prints the keys and exits with status 0.
        arguments: dataclass type; a field without default is required; its docstring may hold one line `name: meaning` a field.

    Raises:
        ConfigError: an argument without `=`, an unknown key (the nearest one is named), a value of the wrong type, a required key left out.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        sys.stdout.write(describe_arguments(arguments))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"arguments: got {argument!r}; needs key=value. Keys: {', '.join(_field_names(arguments))}.")
        _set_dotted(values, key, _parse_value(text, _hint(arguments, key)))
    return structure(arguments, values, who="arguments")


def structure(target: type[T], values: Mapping[str, Any], *, who: str) -> T:
    """Build a dataclass (nested ones too) from a mapping, checking every key and type.

    Args:
        target: dataclass type with annotated fields; fields without default are required.
        values: nested mapping; what is left out keeps its default.
        who: begins the message of an error, such as a file name.

    Raises:
        ConfigError: unknown key (nearest key named), wrong type, required key missing.
    """
    try:
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(target), dict(values))))
    except ConfigKeyError as error:
        raise _unknown_key(target, error.full_key or str(error.key), who) from error
    except MissingMandatoryValue as error:
        key = error.full_key or str(error.key)
        raise ConfigError(f"{who}: {key} is not given; needs a value. Add {key}=VALUE.") from error
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        detail = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{who}: {key + ': ' if key else ''}{detail}; needs {_type_name(_hint(target, key))}. Correct the value.") from error


def describe_arguments(arguments: type) -> str:
    """Help text of a dataclass: its first docstring line, then key, default and meaning of each field."""
    doc = inspect.getdoc(arguments) or ""
    meanings = dict(re.findall(r"^\s*(\w+): (.+)$", doc, flags=re.MULTILINE))
    lines = [doc.splitlines()[0] if doc else arguments.__name__, "", "arguments (key=value):"]
    for field in dataclasses.fields(arguments):
        default = _default_text(field)
        lines.append(f"  {field.name + '=' + default:34s} {meanings.get(field.name, '')}".rstrip())
    return "\n".join(lines) + "\n"


def nearest(word: str, choices: Sequence[str]) -> str:
    """The choices most like `word`, as words for a message: ' Nearest: a, b.' or ''."""
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(near)}." if near else ""


def _unknown_key(target: type, key: str, who: str) -> ConfigError:
    """Unknown key: its nearest neighbours at the same level first, then anywhere in the tree."""
    parent, _, name = key.rpartition(".")
    owner = _resolve(target, parent)
    here = _field_names(owner) if dataclasses.is_dataclass(owner) else []
    near = [f"{parent}.{match}" if parent else match for match in difflib.get_close_matches(name, here, n=2, cutoff=0.6)]
    if not near:
        everywhere = _dotted_keys(target)
        near = [k for k in everywhere if k.rpartition(".")[2] == name] or difflib.get_close_matches(key, everywhere, n=3, cutoff=0.6)
    hint = f"nearest: {', '.join(near[:3])}" if near else f"keys here: {', '.join(here)}"
    return ConfigError(f"{who}: unknown key {key!r}; {hint}. Correct the name.")


def _field_names(target: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(target)]


def _dotted_keys(target: Any, prefix: str = "") -> list[str]:
    """All keys of a tree of dataclasses, dotted."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(target).items():
        keys.append(prefix + name)
        inner = _dataclass_of(hint)
        if inner is not None:
            keys += _dotted_keys(inner, f"{prefix}{name}.")
    return keys


def _dataclass_of(hint: Any) -> type | None:
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _resolve(target: Any, key: str) -> Any:
    """The dataclass (or type hint) that a dotted key leads to; None where it leads nowhere."""
    for name in filter(None, key.split(".")):
        owner = _dataclass_of(target)
        if owner is None:
            return None
        target = typing.get_type_hints(owner).get(name)
    return _dataclass_of(target) or target


def _hint(target: type, key: str) -> Any:
    return _resolve(target, key) if key else None


def _type_name(hint: Any) -> str:
    if hint is None or isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "a mapping of its keys"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _default_text(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return "null" if field.default is None else str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "<required>"


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"arguments: {key} lies below {parent}, which is also given a value; needs one of the two. Delete one.")
        values = inner
    values[name] = value


def _parse_value(text: str, hint: Any) -> Any:
    """A value as YAML, except that text meant for a `str` stays as typed."""
    if text == "null":
        return None
    if hint is str or str in typing.get_args(hint) and typing.get_origin(hint) is not list:
        return text
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text
