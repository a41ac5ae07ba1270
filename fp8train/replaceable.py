"""Which linears a conversion may turn into Float8Linears, and what it says of the others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fp8train.errors import ConfigError

# what a class may define and still compute, move, save and initialise itself as nn.Linear does
_HARMLESS = frozenset({"__annotations__", "__constants__", "__doc__", "__init__", "__module__", "__qualname__"})


def computes_as_linear(kind: type[nn.Module]) -> bool:
    """Whether a class is nn.Linear, or a subclass that adds nothing but an __init__."""
    if not issubclass(kind, nn.Linear):
        return False
    added = kind.__mro__[: kind.__mro__.index(nn.Linear)]
    return all(name in _HARMLESS for each in added for name in vars(each))


def read_only_linears(model: nn.Module) -> set[int]:
    """Ids of linears that their owner does not call: a Float8Linear there would compute nothing."""
    return {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}


def subclasses_refused(refused: Mapping[str, nn.Module], rule: str, precision: str) -> str:
    """Why these linears, by their paths, cannot have a precision that the first of them has from that rule."""
    kinds = ", ".join(dict.fromkeys(f"{type(each).__module__}.{type(each).__qualname__}" for each in refused.values()))
    paths, words = ", ".join(map(repr, refused)), ("is a", "a subclass", "its")
    globs = list(refused)
    if len(refused) > 1:
        words, globs = ("are", "subclasses", "their"), list(dict.fromkeys(_glob(path) for path in refused))
    rules = ", ".join(f"{{match: '{glob}', use: bf16}}" for glob in globs)
    return (
        f"{paths} {words[0]} {kinds}, {words[1]} of nn.Linear whose forward may be {words[2]} own; {precision} needs "
        f"an nn.Linear. Put {rules} before rule {rule!r} to leave what matches as it is, or make it an nn.Linear."
    )


def _glob(path: str) -> str:
    return ".".join("*" if word.isdigit() else word for word in path.split("."))


def check_bare(module: nn.Linear, fqn: str) -> None:
    """Refuse an nn.Linear that carries something which a Float8Linear would not compute with."""
    carried = [f"parameter {name!r}" for name in module._parameters if name not in ("weight", "bias")]
    carried += [f"buffer {name!r}" for name in module._buffers] + [f"module {name!r}" for name in module._modules]
    carried += ["a forward of its own"] if "forward" in vars(module) else []
    carried += ["hooks of DeepSpeed's ZeRO-3"] if "ds_id" in vars(module) else []  # bound to modules that may be moved
    if carried:
        raise ConfigError(
            f"convert_model: {fqn!r} carries {', '.join(carried)}; needs a bare nn.Linear, since a Float8Linear may "
            "not compute with that. Convert first and add it afterwards."
        )
