"""Give every nn.Linear of a model the precision that a recipe names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from fp8train.backends import select_backend
from fp8train.backends.coverage import NOT_COUNTED
from fp8train.backends.interface import Backend
from fp8train.backends.selection import Selection
from fp8train.conversion_report import ConversionReport, ConversionRow, ProducerRow, RopeRow
from fp8train.errors import ConfigError, RecipeError
from fp8train.nn.fused import Fused, plain_module, refusal
from fp8train.nn.fused_layouts import ROPES, Producer, find_producers, full_name
from fp8train.nn.fused_mlp import fused_mlp, mlp_refusal
from fp8train.nn.fused_norm import fused_norm
from fp8train.nn.fused_rope import fused_rope
from fp8train.nn.inputs import InputCache
from fp8train.nn.linear import Float8Linear
from fp8train.nn.remedies import InputRemedy
from fp8train.nn.weights import COPIES, LocalWeight, install_weight_hooks, keep_from_fast_paths
from fp8train.quant.formats import BF16, FP32, LinearPrecision
from fp8train.recipe import Assignment, Recipe, load_recipe
from fp8train.recipe_options import SwigluRemedy
from fp8train.replaceable import check_bare, computes_as_linear, read_only_linears, subclasses_refused
from fp8train.shards import is_sharded
from fp8train.unreached import paths_in_words, unreached

FUSED = ("auto", "always", "never")
_NEVER = "fused=never"
_PLAIN_ATTRIBUTES = frozenset(vars(nn.Linear(1, 1, device="meta")))
_GATED = ("gate_proj", "up_proj")  # what a SwiGLU calls the two factors of its product


@dataclass(slots=True, kw_only=True)
class _Found:
    """A linear of the model, and the paths that lead to it."""

    module: nn.Linear
    read_only: bool = False  # its owner does not call it
    paths: list[str] = field(default_factory=list)

    @property
    def swappable(self) -> bool:
        """Whether a Float8Linear may take its place: a subclass may compute something else than nn.Linear."""
        kind = type(self.module)
        return not self.read_only and (kind is Float8Linear or computes_as_linear(kind))


def convert_model(
    model: nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any],
    backend: str = "auto",
    device_type: str | None = None,
    fused: str = "auto",
    weight_copies: str = COPIES[0],
) -> ConversionReport:
    """Give every nn.Linear of a model the precision that a recipe names, in place.

    Each nn.Linear becomes a Float8Linear, also where it is to run in BF16 or FP32: two recipes differ in the GEMMs, and
    in what `fused` joins to their casts. The objects stay, linears and parameters, and so do state-dict names and
    hooks; works on the meta device. All is checked before anything is changed. Convert before wrapping in DDP or FSDP,
    and before deepspeed.initialize. A second conversion changes precisions.
    A model class may declare `keep_high_precision`, a tuple of globs on module paths relative to it; such a linear
    stays in BF16 unless the rule that covers it names it (Recipe.resolve says when). A subclass of nn.Linear that
    adds more than an __init__ is left as it is where its rule says bf16 or fp32, and refused elsewhere; out_proj of
    nn.MultiheadAttention, which reads the weight and calls nothing, is left as it is.

    Args:
        model: any module that contains nn.Linear modules with FP32 weights.
        recipe: a Recipe, or what load_recipe takes.
        backend: "auto", or a backend's name.
        device_type: where the model will run; None takes the device of its parameters.
        fused: which norms and MLPs make the FP8 inputs of linears themselves (nn/fused.py), and rotary embeddings:
            "auto" those that the backend has kernels for, "always" all that the precisions permit, "never" none.
        weight_copies: FP8 codes kept between steps: "both", of w and w.T, or "one", from which backward makes w.T.

    Returns:
        ConversionReport: one row for each linear.

    Raises:
        ValueError: fused or weight_copies is none of these.
        RecipeError: the recipe does not fit the model; the message names the rule or the module.
        ConfigError: a linear cannot be replaced without loss; the message says why.
        BackendError: the backend cannot run here, or cannot serve a precision of the recipe.
    """
    _check_choices(fused=(fused, FUSED), weight_copies=(weight_copies, COPIES))
    recipe, linears = recipe if isinstance(recipe, Recipe) else load_recipe(recipe), _find_linears(model)
    shapes = {path: (found.module.out_features, found.module.in_features) for found in linears for path in found.paths}
    others = tuple(unreached(model))
    assigned = recipe.resolve(shapes, _kept(model, shapes), paths_in_words(others))
    _check(model, linears, assigned, recipe.source)
    swappable = [found for found in linears if found.swappable]
    precisions = [assigned[found.paths[0]].precision for found in swappable]
    needed = dict.fromkeys([*precisions, *(recipe.precisions[part.use] for part in recipe.schedule)])
    selection = select_backend(backend, device_type or _device_type(model), needed)
    treated = _swiglu_blocks(model, recipe)
    selection.backend.expect(needed)
    _swap(swappable, precisions, selection.backend.name, weight_copies)
    _set_remedies(model, recipe.swiglu, treated)
    install_weight_hooks(model)
    keep_from_fast_paths(model)
    return ConversionReport(
        recipe=recipe.name, recipe_hash=recipe.hash,
        backend=selection.backend.name, backend_reason=selection.reason,
        rows=tuple(_row(found, assigned[found.paths[0]], selection) for found in linears),
        others=others, producers=tuple(_fuse(model, fused, selection.backend)),
        ropes=tuple(_fuse_ropes(model, fused, selection.backend)),
    )  # fmt: skip


def _check_choices(**given: tuple[str, Sequence[str]]) -> None:
    for name, (choice, choices) in given.items():
        if choice not in choices:
            raise ValueError(f"convert_model: {name} is {choice!r}; needs one of {', '.join(choices)}.")


def _find_linears(model: nn.Module) -> list[_Found]:
    """Every nn.Linear of the model once, subclasses too, in the order of its modules."""
    kind = type(model).__name__
    if isinstance(model, nn.Linear):
        raise ConfigError(
            f"convert_model: the model itself is a {kind}; needs one that contains it, since recipes match paths below "
            "the model. Pass nn.Sequential(linear)."
        )
    found: dict[int, _Found] = {}
    read_only = read_only_linears(model)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            fresh = _Found(module=module, read_only=id(module) in read_only)
            found.setdefault(id(module), fresh).paths.append(path)
    if not found:
        raise ConfigError(f"convert_model: {kind} has no nn.Linear; needs at least one. Pass a module that has.")
    return list(found.values())


def _kept(model: nn.Module, paths: Collection[str]) -> dict[str, str]:
    """Path of each linear that a model class keeps in high precision -> what declares it."""
    kept: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        patterns = getattr(type(module), "keep_high_precision", ())
        keeper = f"{type(module).__name__}.keep_high_precision"
        if not isinstance(patterns, Sequence) or isinstance(patterns, str):
            raise ConfigError(f"{keeper} is {patterns!r}; needs a tuple of globs. Write ('lm_head',).")
        start = f"{prefix}." if prefix else ""
        for pattern in patterns:
            kept.update({p: keeper for p in paths if p.startswith(start) and fnmatchcase(p[len(start) :], pattern)})
    return kept


def _check_subclasses(linears: Sequence[_Found], assigned: Mapping[str, Assignment], source: str) -> None:
    """Refuse linears that are to be quantised and may compute something else, all at once."""
    chosen = {found.paths[0]: assigned[found.paths[0]] for found in linears}
    refused = {
        fqn: found.module for found, (fqn, choice) in zip(linears, chosen.items(), strict=True)
        if not (found.swappable or found.read_only) and choice.precision not in (BF16, FP32)
    }  # fmt: skip
    if refused:
        first = chosen[next(iter(refused))]
        raise RecipeError(f"{source}: {subclasses_refused(refused, first.rule, first.precision.name)}")


def _check(model: nn.Module, linears: Sequence[_Found], assigned: Mapping[str, Assignment], source: str) -> None:
    """Refuse what cannot be converted, before anything is changed."""
    _check_subclasses(linears, assigned, source)
    for found in linears:
        _check_one(found, assigned, source)
    _check_methods(model, linears)


def _check_one(found: _Found, assigned: Mapping[str, Assignment], source: str) -> None:
    """Refuse a linear that cannot have the precision assigned to it."""
    module, fqn = found.module, found.paths[0]
    chosen = assigned[fqn]
    for other in found.paths[1:]:
        theirs = assigned[other]
        if theirs.precision != chosen.precision:
            raise RecipeError(
                f"{source}: {fqn!r} and {other!r} are one module; rule {chosen.rule!r} gives {chosen.precision.name} "
                f"and rule {theirs.rule!r} gives {theirs.precision.name}; needs one precision. Let one rule cover both."
            )
    if not found.swappable:
        return
    for name, parameter in (("weight", module.weight), ("bias", module.bias)):
        if parameter is not None and parameter.dtype is not torch.float32:
            raise ConfigError(
                f"convert_model: {fqn}.{name} is {parameter.dtype}; needs torch.float32, the master that the GEMMs' "
                "copies are made from. Call model.float() first, or load with dtype=torch.float32."
            )
        if is_sharded([] if parameter is None else [parameter]):
            raise ConfigError(
                f"convert_model: {fqn}.{name} is sharded; needs a plain tensor. Convert first, then shard."
            )
    if not isinstance(module, Float8Linear):
        check_bare(module, fqn)


def _check_methods(model: nn.Module, linears: Sequence[_Found]) -> None:
    """Refuse an attribute of the model that holds a method of an nn.Linear: it would compute in FP32 ever after."""
    paths = {id(found.module): found.paths[0] for found in linears if not isinstance(found.module, Float8Linear)}
    for fqn, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, MethodType) and value.__name__ == "forward" and id(value.__self__) in paths:
                owner, linear = fqn or "the model", paths[id(value.__self__)]
                raise ConfigError(
                    f"convert_model: {name!r} of {owner!r} is the forward of {linear!r} as nn.Linear has it; "
                    "needs the module, whose forward will be another. Set it after converting."
                )


def _device_type(model: nn.Module) -> str:
    """Where the parameters are; "meta" if all of them are there."""
    types = sorted({parameter.device.type for parameter in model.parameters()} - {"meta"})
    if len(types) > 1:
        raise ConfigError(f"convert_model: parameters are on {' and '.join(types)}; needs one device. Move the model.")
    return types[0] if types else "meta"


def _swap(linears: Sequence[_Found], precisions: Sequence[LinearPrecision], backend: str, copies: str) -> None:
    """Turn every nn.Linear into a Float8Linear; change the precision of those that are one already."""
    converted = [found.module for found in linears if isinstance(found.module, Float8Linear)]
    inputs = converted[0].inputs if converted else InputCache()
    replacements = [
        found.module if isinstance(found.module, Float8Linear) else _replacement(found, precision, backend)
        for found, precision in zip(linears, precisions, strict=True)
    ]
    # nothing of the model has been written to up to here, and nothing below refuses
    for found, made, precision in zip(linears, replacements, precisions, strict=True):
        linear = made if made is found.module else Float8Linear.take_place(found.module, made)
        linear.inputs = inputs
        if (linear.precision, linear.backend_name, linear.provider.copies) != (precision, backend, copies):
            if isinstance(linear.provider, LocalWeight):
                linear.provider = LocalWeight(copies)
            linear.set_precision(precision, backend)


def _swiglu_blocks(model: nn.Module, recipe: Recipe) -> list[str]:
    """Paths of the down projections that the recipe's swiglu covers; each lies beside its gate_proj and up_proj."""
    if recipe.swiglu is None:
        return []
    found = [
        fqn for fqn, module in model.named_modules() if isinstance(module, nn.Linear) and recipe.swiglu.covers(fqn)
    ]
    for fqn in found:
        parent = model.get_submodule(fqn.rpartition(".")[0])
        beside: list[type[Any]] = [type(getattr(parent, name, None)) for name in _GATED]
        if not all(kind is Float8Linear or computes_as_linear(kind) for kind in beside):
            raise RecipeError(
                f"{recipe.source}: swiglu: {fqn!r} has no {' and '.join(_GATED)} beside it; needs the down projection "
                "of a SwiGLU. Correct match."
            )
    if not found:
        raise RecipeError(
            f"{recipe.source}: swiglu: match {recipe.swiglu.match!r} covers no linear; needs at least one. Correct it, "
            "or delete swiglu."
        )
    return found


def _set_remedies(model: nn.Module, swiglu: SwigluRemedy | None, treated: Collection[str]) -> None:
    """Give each down projection of a SwiGLU its remedy, and take it from all others."""
    for fqn, module in model.named_modules():
        if not isinstance(module, Float8Linear):
            continue
        remedy = None
        if swiglu is not None and fqn in treated:
            parent = model.get_submodule(fqn.rpartition(".")[0])
            smooth = tuple(getattr(parent, name) for name in _GATED) if swiglu.smooth else None
            remedy = InputRemedy(clamp=swiglu.clamp, smooth=smooth)
        if remedy != module.remedy:
            module.set_remedy(remedy)


def _slots(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a module -> the (parent, name) that hold it."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                slots.setdefault(id(child), []).append((parent, name))
    return slots


def _fuse(model: nn.Module, fused: str, backend: Backend) -> list[ProducerRow]:
    """Put fused modules in the place of norms and MLPs whose linears permit, and plain ones back everywhere else."""
    slots = _slots(model)
    for held in slots.values():
        parent, name = held[0]
        child = getattr(parent, name)
        if isinstance(child, Fused):
            setattr(parent, name, plain_module(child))
    rows: dict[str, ProducerRow] = {}
    producers = list(find_producers(model))
    for producer in sorted(producers, key=lambda row: row.norm is not None):  # MLPs first: norms look at their hooks
        parent_path, _, name = producer.fqn.rpartition(".")
        parent = model.get_submodule(parent_path)
        module = getattr(parent, name)
        linears = [linear for fqn in producer.linears if isinstance(linear := model.get_submodule(fqn), Float8Linear)]
        why = _why_plain(module, linears, producer, fused, backend, len(slots.get(id(module), ())) > 1)
        if why is None and producer.norm is not None:
            through = [model.get_submodule(path) for path in dict.fromkeys(map(_parent, producer.linears))]
            setattr(parent, name, fused_norm(module, linears, through, producer.norm))
        elif why is None:
            setattr(parent, name, fused_mlp(module))
        rows[producer.fqn] = ProducerRow(fqn=producer.fqn, linears=producer.linears, refusal=why)
    return [rows[producer.fqn] for producer in producers]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _fuse_ropes(model: nn.Module, fused: str, backend: Backend) -> list[RopeRow]:
    """Give the rotary embeddings of a known class a kernel, whatever the precisions; after `_fuse`, which takes it."""
    rows = []
    slots, has_kernel = _slots(model), backend.has_rope()
    for fqn, module in list(model.named_modules()):
        if full_name(module) in ROPES:
            parent, name = slots[id(module)][0]
            why = _why_kept(module, fused, backend, has_kernel or fused == "always", len(slots[id(module)]) > 1)
            if why is None:
                setattr(parent, name, fused_rope(module, backend.name))
            rows.append(RopeRow(fqn=fqn, refusal=why or (None if has_kernel else _no_kernel(backend))))
    return rows


def _why_plain(
    module: nn.Module, linears: Sequence[Float8Linear], producer: Producer, fused: str, backend: Backend, shared: bool
) -> str | None:
    """Why a norm or an MLP is not fused, or None."""
    if fused == "never":
        return _NEVER
    if len(linears) < len(producer.linears):
        return "one of its linears was wrapped or left as it is, and is no Float8Linear"
    if why := (mlp_refusal(*linears) if producer.norm is None else refusal(linears)):
        return why
    made = [(linears[-1].precision.fprop.left, linears[-1].precision.wgrad.right)]
    if producer.norm is None:
        made.append((linears[0].precision.dgrad.left, linears[0].precision.wgrad.left))
    served = fused != "auto" or all(row is not None and backend.fuses(row, col) for row, col in made)
    return _why_kept(module, fused, backend, served, shared)


def _why_kept(module: nn.Module, fused: str, backend: Backend, served: bool, shared: bool) -> str | None:
    """Why a module of a known class is not swapped, whatever its linears permit, or None.

    served: the backend has a kernel for it, or none is asked for.
    """
    if fused == "never":
        return _NEVER
    if "forward" in vars(module):
        return "it has a forward of its own"
    if not served:
        return _no_kernel(backend)
    return "the model uses it in several places" if shared else None


def _no_kernel(backend: Backend) -> str:
    return f"backend {backend.name} has no kernel for it"


def _replacement(found: _Found, precision: LinearPrecision, backend: str) -> Float8Linear:
    """What an nn.Linear will be; others may have set attributes on it, but none that a Float8Linear has."""
    linear = Float8Linear.from_linear(found.module, precision, backend)
    for name in vars(found.module).keys() - _PLAIN_ATTRIBUTES:  # e.g. transformers marks what it has initialised
        if hasattr(linear, name):
            raise ConfigError(
                f"convert_model: {found.paths[0]!r} has an attribute {name!r} of its own; needs a name that is free in "
                "Float8Linear. Rename it."
            )
    return linear


def _row(found: _Found, chosen: Assignment, selection: Selection) -> ConversionRow:
    (fqn, *other_names), linear = found.paths, found.module
    numbers: LinearPrecision | None = None
    copies = COPIES[0]
    reason, backend, site = f"{chosen.reason}; a {type(linear).__name__} is left as it is", "torch", NOT_COUNTED
    if found.read_only:
        reason = "nn.MultiheadAttention reads its weight and does not call it, so that it is left as it is"
    if isinstance(linear, Float8Linear):
        numbers, reason, backend, site = chosen.precision, chosen.reason, selection.backend.name, linear.site
        copies = linear.provider.copies
    return ConversionRow(
        fqn=fqn, shape=(linear.out_features, linear.in_features), has_bias=linear.bias is not None, numbers=numbers,
        backend=backend, rule=chosen.rule, reason=reason, site=site, copies=copies, other_names=tuple(other_names),
    )  # fmt: skip
