from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fp8train.distributed import World
from fp8train.distributed.agreement import check_same, on_every_rank, ranks_text
from fp8train.errors import ConfigError, DataError
from fp8train.trainer import Trainer
from tests.distributed.ranks import run_ranks


def refusals(world: World) -> list[str]:
    """What each rank is told: of facts that are the same, that differ, and of an error that only rank 1 meets."""
    check_same(world, {"seed": 1}, "")
    told = []
    with pytest.raises(ConfigError) as refused:
        check_same(world, {"model": "a", "lr": 0.1 if world.rank else 0.2, "seed": world.rank}, "Start alike.")
    told.append(str(refused.value))

    def read() -> str:
        if world.rank == 1:
            raise DataError("text.txt is missing")
        return "text"

    with pytest.raises(DataError) as missing:
        on_every_rank(world, read)
    told.append(str(missing.value))
    assert on_every_rank(world, lambda: world.rank) == world.rank
    return told


def test_every_rank_is_told_which_rank_has_what(tmp_path: Path):
    one, two, three = run_ranks(refusals, 3, tmp_path)
    assert one == two == three == [
        "distributed: ranks 1 and 2 have lr=0.1, rank 0 has 0.2, as well as another seed; needs the same on every "
        "rank. Start alike.",
        "on rank 1, not on rank 0: text.txt is missing",
    ]  # fmt: skip


def resumed(world: World) -> list[str]:
    """A stream that rank 1 reads to its position more slowly than a collective waits; and one that it cannot read."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)

    def skip_to(step: int, streams: object) -> str:
        if world.rank == 1:
            time.sleep(3)
        if world.rank == 1 and step == 2:
            raise DataError("the stream has ended")
        return f"step {step}"

    trainer = SimpleNamespace(world=world, model=None, optimizer=None, batcher=SimpleNamespace(skip_to=skip_to))
    state = SimpleNamespace(progress={"coverage_of_all_ranks": True}, data_position={})  # of an earlier version
    found = [SimpleNamespace(step=step, state=state, restore=lambda *arguments: None) for step in (1, 2)]
    told = [Trainer._take_back(trainer, found[0])]
    with pytest.raises(DataError) as refused:
        Trainer._take_back(trainer, found[1])
    return [*told, str(refused.value)]


def test_ranks_wait_for_the_one_that_reads_on_slowly_and_end_with_its_error(tmp_path: Path):
    assert run_ranks(resumed, 2, tmp_path) == [["step 1", "on rank 1, not on rank 0: the stream has ended"]] * 2


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([1, 3], "ranks 1 and 3"), ([8, 9, 10], "ranks 8 to 10"), ([1, 3, 9], "ranks 1, 3 and 1 more")],
)
def test_ranks_are_named_in_few_words(ranks: list[int], text: str):
    assert ranks_text(ranks) == text
