"""From text to dataclasses: key=value arguments and mappings, with every key and type checked."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import os.path
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from fp8train.errors import ConfigError

T = TypeVar("T")
REQUIRED = "<required>"
# keys, and what other trainers call them
OTHER_NAMES = {
    "recipe": "precision dtype fp8 bf16 fp16 amp",
    "steps": "epochs num_epochs num_train_epochs num_train_steps max_iters train_iters",
    "run_dir": "output_dir out_dir save_dir out",
    "resume": "resume_from resume_from_checkpoint load_checkpoint",
    "seq_len": "context_length block_size max_length max_seq_length",
    "global_batch_tokens": "batch_size train_batch_size",
    "micro_batch_samples": "batch_size per_device_train_batch_size gradient_accumulation_steps",
    "activation_checkpointing": "gradient_checkpointing recompute",
    "model.init_from": "model_name_or_path pretrained",
    "model.hidden_size": "hidden_dim d_model n_embd dim",
    "model.num_layers": "n_layer n_layers depth",
    "data.path": "dataset dataset_path train_file",
    "optim.lr": "learning_rate max_lr peak_lr",
    "optim.min_lr_ratio": "min_lr min_learning_rate",
    "optim.schedule": "scheduler lr_scheduler lr_scheduler_type lr_decay_style",
    "optim.warmup_steps": "warmup warmup_iters lr_warmup_steps",
    "optim.warmup_fraction": "warmup warmup_ratio",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.clip_grad_norm": "grad_clip clip_grad max_grad_norm gradient_clipping gradient_clip_val",
    "parallel.strategy": "fsdp ddp",
    "parallel.shard_ranks": "hsdp data_parallel_shard_degree",
    "checkpoint.every": "save_every save_steps save_interval",
    "eval.every": "eval_steps eval_interval",
    "log.every": "logging_steps log_interval",
}


class _Scalars(yaml.SafeLoader):
    """YAML with null and plain whole numbers; other scalars stay text, of which `structure` makes what a field wants.

    YAML 1.1 takes 010 for 8, 1:30 for 90 and `on` for true.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Scalars.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"-?(0|[1-9][0-9]*)$"), list("-0123456789"))


def parse_arguments(argv: Sequence[str], arguments: type[T]) -> T:
    """Read `key=value` arguments into a dataclass; for commands whose arguments are not a whole run configuration.

    Args:
        argv: such as ["checkpoint=DIR", "tokens=64"]; nested keys are dotted; -h or --help prints the keys and exits 0.
        arguments: dataclass type; a field without default is required. Docstring lines `name: meaning` become help.

    Raises:
        ConfigError: no `=`, an unknown key (the nearest is named), a value of the wrong type, a required key left out.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        sys.stdout.write(describe(arguments))
        raise SystemExit(0)
    return structure(arguments, literal(parse_assignments(argv, arguments)), who="arguments")


def take_arguments(argv: Sequence[str], arguments: type[T], others: type | None = None) -> tuple[T, list[str]]:
    """(those of a dataclass, as parse_arguments reads them, the rest); for commands that take the keys of a run too.

    others: dataclass of the rest; an unknown key that is nearest to one of `arguments` is taken for that, misspelt.
    """
    names = _field_names(arguments)
    known = [*names, *(_field_names(others) if others else ())]

    def is_own(argument: str) -> bool:
        key, equals, _ = argument.partition("=")
        if others and equals and key not in known and "." not in key:
            key = next(iter(difflib.get_close_matches(key, known, n=1)), key)
        return key in names

    return parse_arguments([*filter(is_own, argv)], arguments), [*itertools.filterfalse(is_own, argv)]


def with_key(argv: Sequence[str], key: str) -> list[str]:
    """`fp8train eval runs/a` as `checkpoint=runs/a`: the first argument, if it is neither `key=value` nor an option."""
    first, *rest = argv or [""]
    bare = first != "" and "=" not in first and not first.startswith("-")
    return [f"{key}={first}", *rest] if bare else list(argv)


def literal(value: Any) -> Any:
    """The same with ${...} as text for `structure`.

    An argument, such as a prompt, refers to no other. A configuration that a run left has nothing open: in one of a
    stranger's ${oc.env:WANDB_API_KEY} would read it from the reader's environment, into a path or an address.
    """
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", value)
    return value


def parse_assignments(argv: Sequence[str], target: type) -> dict[str, Any]:
    """`a.b=value` arguments as a nested mapping for `structure`: lists are YAML, one value stays text."""
    values: dict[str, Any] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            names = ", ".join(_field_names(target))
            raise ConfigError(f"arguments: got {argument!r}; needs key=value. Keys: {names}.")
        _set_dotted(values, key, _parse_value(key, text, _resolve(target, key)))
    return values


def structure(target: type[T], values: Mapping[str, Any], *, who: str) -> T:
    """Build a dataclass (nested ones too) from a mapping, checking every key and type.

    Args:
        target: dataclass type with annotated fields; fields without default are required.
        values: nested mapping; what is left out keeps its default.
        who: begins the message of an error, such as a file name.

    Raises:
        ConfigError: unknown key (the nearest is named), wrong type, required key missing.
    """
    _check_entries(target, values, who, "")
    try:
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(target), dict(values))))
    except ConfigKeyError as error:
        raise _unknown_key(target, error.full_key or str(error.key), who) from error
    except MissingMandatoryValue as error:
        key = error.full_key or str(error.key)
        raise ConfigError(f"{who}: {key} is not given; needs a value. Add {key}=VALUE.") from error
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        place = f"{who}: {key}" if key else who
        got, want = _value_at(values, key), _type_name(_resolve(target, key))
        why = f" ({str(error).splitlines()[0]})" if "${" in str(got) else ""
        raise ConfigError(f"{place}: got {got!r}{why}; needs {want}. Correct the value.") from error


def _check_entries(target: type, values: Mapping[str, Any], who: str, prefix: str) -> None:
    """Check dataclasses in lists one by one: OmegaConf does not say which of them an unknown key is in."""
    for name, hint in typing.get_type_hints(target).items():
        value, inner = values.get(name), _dataclass_of(hint)
        if inner is not None and isinstance(value, Mapping):
            _check_entries(inner, value, who, f"{prefix}{name}.")
        entry = next(iter(typing.get_args(hint)), None) if typing.get_origin(hint) is list else None
        if isinstance(entry, type) and dataclasses.is_dataclass(entry) and isinstance(value, list):
            for number, given in enumerate(value):
                if isinstance(given, Mapping) and "${" not in str(given):  # it may refer to keys outside of the entry
                    structure(entry, given, who=f"{who}: {prefix}{name}[{number}]")


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, with those of `changes` on top; a list is replaced as a whole."""
    result = dict(values)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; an empty one below is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        below = isinstance(value, Mapping) and value
        flat |= flattened(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return flat


def describe(target: type, values: Mapping[str, Any] | None = None) -> str:
    """Help text of a dataclass: its first docstring line, then key=value and meaning of each field.

    values: nested, as OmegaConf gives them; what they leave out has its default.
    """
    doc = inspect.getdoc(target) or ""
    title = [doc.splitlines()[0] if doc else target.__name__, "", "arguments (key=value):"]
    return "\n".join(title + _describe_fields(target, "", values or {})) + "\n"


def _describe_fields(target: type, prefix: str, values: Mapping[str, Any]) -> list[str]:
    meanings = _field_docs(target)
    hints = typing.get_type_hints(target)
    lines = []
    for field in dataclasses.fields(target):
        inner = _dataclass_of(hints[field.name])
        if inner is not None:
            lines += _describe_fields(inner, f"{prefix}{field.name}.", values.get(field.name) or {})
            continue
        value = _text(values[field.name]) if field.name in values else _default_text(field)
        assignment = f"{prefix}{field.name}={value}"
        lines.append(f"  {assignment:38s} {meanings.get(field.name, '')}".rstrip())
    return lines


def _field_docs(target: type) -> dict[str, str]:
    """Field name -> its meaning, from docstring lines `name: meaning` of the class and of its bases.

    Lines that are indented further go on with it.
    """
    docs: dict[str, str] = {}
    for owner in reversed([base for base in target.__mro__ if dataclasses.is_dataclass(base)]):
        entries = re.findall(r"^( *)(\w+): (.+(?:\n\1 +\S.*)*)$", inspect.getdoc(owner) or "", flags=re.MULTILINE)
        docs.update({name: " ".join(meaning.split()) for _, name, meaning in entries})
    return docs


def _unknown_key(target: type, key: str, who: str) -> ConfigError:
    """Unknown key: what others call so, names like it at its level, the same name elsewhere, then anything like it."""
    parent, _, name = key.rpartition(".")
    owner = _resolve(target, parent) if parent else target
    here = _field_names(owner) if dataclasses.is_dataclass(owner) else []
    everywhere = _dotted_keys(target)
    near = [ours for ours, theirs in OTHER_NAMES.items() if name in theirs.split() and ours in everywhere]
    near += [candidate for candidate in everywhere if candidate.endswith(f".{name}") and not parent]
    near += [dotted for dotted in [name.replace("_", ".", 1)] if dotted in everywhere]
    near += [f"{parent}.{match}".lstrip(".") for match in difflib.get_close_matches(name, here, n=2, cutoff=0.6)]
    if not near:
        same_name = [candidate for candidate in everywhere if candidate.rpartition(".")[2] == name]
        near = same_name or difflib.get_close_matches(key, everywhere, n=3, cutoff=0.6)
    near = list(dict.fromkeys(near))
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
    """The dataclass itself, or the one of `Dataclass | None`."""
    union = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    for candidate in (hint, *union):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _resolve(target: Any, key: str) -> Any:
    """The dataclass or type hint that a dotted key leads to; None where it leads nowhere."""
    for name in key.split("."):
        owner = _dataclass_of(target)
        if owner is None:
            return None
        plain, _, index = name.partition("[")
        target = typing.get_type_hints(owner).get(plain)
        if index:  # of a list, or of None in place of one: the type of its entries
            lists = [part for part in (target, *typing.get_args(target)) if typing.get_origin(part) in (list, tuple)]
            target = next((typing.get_args(part)[0] for part in lists), None)
    return _dataclass_of(target) or target


def _type_name(hint: Any) -> str:
    if hint is None or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return "its keys, as KEY.NAME=VALUE"
    if any(typing.get_origin(part) in (tuple, list) for part in (hint, *typing.get_args(hint))):
        return "a list, such as [VALUE,VALUE], with quotes around a value that has a * in it"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _default_text(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return _text(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _text(field.default_factory())
    return REQUIRED


def _text(value: Any) -> str:
    """A value as YAML would have it; `???` is OmegaConf's word for one that must be given."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else REQUIRED if value == "???" else str(value)


def _value_at(values: Mapping[str, Any], key: str) -> Any:
    """What nested mappings have under a dotted key; None where they end before."""
    for name in key.split("."):
        if not isinstance(values, Mapping):
            return None
        name, _, index = name.partition("[")
        values = values.get(name, {}) if name else values
        values = values[int(index.rstrip("]"))] if index and isinstance(values, list) else values
    return values


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"arguments: {key} and {parent} are both given; needs one of the two. Delete the other.")
        values = inner
    values[name] = value


def _parse_value(key: str, text: str, hint: Any) -> Any:
    """Text for a `str` or a `Path` stays as typed, less quotes around the whole of it; else YAML, as _Scalars has it.

    A ~ that begins a `Path` is the home folder, without quotes: shells leave that of checkpoint=~/x alone.
    """
    if text == "null":
        return None
    kinds = (hint, *(typing.get_args(hint) if typing.get_origin(hint) not in (list, dict) else ()))
    if Path in kinds and not text:  # as from out=$UNSET; the empty path would be the folder that the user stands in
        raise ConfigError(f"arguments: {key} is empty; needs a path. Give {key}=PATH, or leave it out.")
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    if not text or ((str in kinds or Path in kinds) and not quoted):
        return os.path.expanduser(text) if Path in kinds else text
    try:
        return yaml.load(text, _Scalars)
    except yaml.YAMLError:
        return text
