"""What the ranks of a run must have in common, and errors of one rank that end all of them with the same message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fp8train.distributed.world import World
from fp8train.errors import ConfigError, TrainingError, UserError

T = TypeVar("T")


def check_same(world: World, facts: Mapping[str, Any], remedy: str) -> None:
    """Refuse, on every rank, facts that are not the same on all of them.

    Args:
        facts: name -> plain value of this rank, the most telling first. remedy: a sentence for whoever has to act.

    Raises:
        ConfigError: names the first fact that differs, both values and the ranks.
    """
    every = world.all_gather_object(dict(facts))
    own = every[0]
    names = list(dict.fromkeys(name for other in every for name in other))
    different = [name for name in names if any(_value(other, name) != _value(own, name) for other in every)]
    if not different:
        return
    name, rest = different[0], len(different) - 1
    found = next(value for other in every if (value := _value(other, name)) != _value(own, name))
    ranks = [rank for rank, other in enumerate(every) if _value(other, name) == found]
    more = f", as well as another {' and '.join(different[1:3])}{' and more' * (rest > 2)}" if rest else ""
    raise ConfigError(
        f"distributed: {ranks_text(ranks)} {'has' if len(ranks) == 1 else 'have'} {name}={found}, rank 0 has "
        f"{_value(own, name)}{more}; needs the same on every rank. {remedy}"
    )


def on_every_rank(world: World, action: Callable[[], T], *, patient: bool = False) -> T:
    """Run something on every rank and return its result there; an error of one rank is raised on all of them.

    patient: one rank may take longer for it than another by more than parallel.timeout_seconds.

    Raises:
        UserError or TrainingError: that of the lowest rank that met one, which it names where that is not rank 0.
    """
    result: list[T] = []
    refusal: UserError | TrainingError | None = None
    try:
        result.append(action())
    except (UserError, TrainingError) as error:
        refusal = error
    for rank, met in enumerate(world.all_gather_object(refusal, patient=patient)):
        if met is not None:
            raise met if rank == 0 else type(met)(f"on rank {rank}, not on rank 0: {met}")
    return result[0]


def on_main(world: World, action: Callable[[], T], *, patient: bool = False) -> T:
    """Run something on rank 0 and hand its result to every rank; a UserError or TrainingError is raised on each.

    patient: it reads or writes whole checkpoints, for which the others wait longer than parallel.timeout_seconds.
    """
    outcome: tuple[Any, UserError | TrainingError | None] = (None, None)
    if world.main:
        try:
            outcome = (action(), None)
        except (UserError, TrainingError) as error:
            outcome = (None, error)
    result, refusal = world.broadcast_object(outcome, patient=patient)
    if refusal is not None:
        raise refusal
    return result


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 1`, `ranks 1 and 3`, `ranks 8 to 15`, `ranks 1, 3 and 62 more`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    shown = [str(rank) for rank in ranks[:2]]
    return f"ranks {', '.join(shown)} and {len(ranks) - 2} more" if len(ranks) > 2 else f"ranks {' and '.join(shown)}"


def _value(facts: Mapping[str, Any], name: str) -> str:
    """As text; a rank with another version of the program may not know the fact."""
    return str(facts[name]) if name in facts else "nothing"
