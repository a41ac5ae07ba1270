"""Linears that read one input: a change of precision takes them together, so that the input is rounded once."""

from __future__ import annotations

from collections.abc import Iterable

SHARED_INPUT = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}


def input_groups(paths: Iterable[str]) -> list[list[str]]:
    """q, k, v and gate, up of one parent are a group, all others are alone; in the order of the paths."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        kind = next((kind for kind, names in SHARED_INPUT.items() if name in names), name)
        groups.setdefault((parent, kind), []).append(path)
    return list(groups.values())


def group_of(fqn: str, paths: Iterable[str]) -> list[str]:
    """The group that a linear belongs to."""
    return next(group for group in input_groups(paths) if fqn in group)
