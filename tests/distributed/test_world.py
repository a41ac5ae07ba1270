"""Rendezvous and what ranks tell each other."""

from __future__ import annotations

import math
import socket

import pytest
import torch

from fp8train.distributed import World, init
from fp8train.distributed.world import read_rendezvous
from fp8train.errors import ConfigError
from tests.distributed.ranks import free_port, rendezvous, run_ranks

COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}


def _collectives(world):
    """Every collective once; rank r contributes r + 1."""
    own = world.rank + 1
    tensor = torch.tensor([own, 0.1], dtype=torch.float32)
    return {
        "identity": (world.rank, world.world_size, world.local_rank, str(world.device), world.main),
        "sum_number": world.all_reduce_sum(float(own)),
        "sum_tensor": world.all_reduce_sum(tensor).tolist(),
        "sum_left_alone": tensor.tolist(),
        "max_number": world.all_max(float(own)),
        "max_tensor": world.all_max(torch.tensor([own, -own])).tolist(),
        "max_nan_first": world.all_max(math.nan if world.rank == 0 else 1.0),
        "max_nan_last": world.all_max(math.nan if world.rank == 1 else 1.0),
        "any_one": world.any(world.rank == 1),
        "any_none": world.any(False),
        "broadcast": world.broadcast_object({"from": world.rank}),
        "gather": world.all_gather_object(f"r{world.rank}"),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(_collectives, 2, tmp_path_factory.mktemp("ranks"))


POINT_ONE = torch.tensor(0.1, dtype=torch.float32).item()
EXPECTED = {
    "sum_number": 3.0, "sum_tensor": [3.0, 2 * POINT_ONE], "max_number": 2.0, "max_tensor": [2, -1], "any_one": True,
    "any_none": False, "broadcast": {"from": 0}, "gather": ["r0", "r1"],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_collective_gives_every_rank_the_same(two_ranks, name):
    assert [result[name] for result in two_ranks] == [EXPECTED[name]] * 2


def test_each_rank_knows_its_place(two_ranks):
    assert [result["identity"] for result in two_ranks] == [(0, 2, 0, "cpu", True), (1, 2, 1, "cpu", False)]


def test_sum_leaves_its_argument_alone(two_ranks):
    assert [result["sum_left_alone"] for result in two_ranks] == [[1.0, POINT_ONE], [2.0, POINT_ONE]]


@pytest.mark.parametrize("name", ["max_nan_first", "max_nan_last"])
def test_nan_of_one_rank_reaches_all_through_max(two_ranks, name):
    assert all(math.isnan(result[name]) for result in two_ranks)


def test_single_process_is_a_world_of_one():
    world = World()
    tensor = torch.ones(2)
    assert (world.main, world.all_reduce_sum(2.5), world.all_max(3), world.any(True), world.any(False)) == (
        True, 2.5, 3, True, False,
    )  # fmt: skip
    assert torch.equal(world.all_reduce_sum(tensor), tensor)
    assert (world.broadcast_object("x"), world.all_gather_object("x")) == ("x", ["x"])
    with world:
        pass


def test_init_without_torchrun_needs_no_variables(monkeypatch):
    for name in COMPLETE:
        monkeypatch.delenv(name, raising=False)
    world = init(device_type="cpu")
    assert (world.rank, world.world_size, world.device) == (0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "want"),
    [({}, (0, 1, 0)), ({"WORLD_SIZE": "1"}, (0, 1, 0)), ({"MASTER_ADDR": "h"}, (0, 1, 0)), (COMPLETE, (1, 2, 1))],
    ids=["none", "size_one", "address_only", "torchrun"],
)
def test_rendezvous_variables(environment, want):
    assert read_rendezvous(environment) == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": ""}, "MASTER_PORT not set"),
        ({"RANK": ""}, "RANK not set"),
        ({"RANK": "one"}, "RANK is 'one'.*needs whole numbers"),
        ({"RANK": "2"}, "RANK is '2', WORLD_SIZE is '2'.*needs RANK and LOCAL_RANK below WORLD_SIZE"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ],
    ids=["no_port", "no_rank", "not_a_number", "too_large", "negative"],
)
def test_contradictory_variables_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_rendezvous({**COMPLETE, **changes})


def test_several_ranks_without_their_rank_are_refused():
    with pytest.raises(ConfigError, match="RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT not set"):
        read_rendezvous({"WORLD_SIZE": "2"})


def _init(monkeypatch, rank, port):
    for name, value in rendezvous(rank, 2, port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        init(2, "cpu")
    assert not torch.distributed.is_initialized()
    return str(caught.value)


def test_port_in_use_is_one_line_with_the_remedy(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        message = _init(monkeypatch, 0, port)
    assert message == (
        f"distributed: port {port} (MASTER_PORT) is in use; needs a free one. "
        "Set another MASTER_PORT, or start with torchrun --standalone, which finds one."
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_one_line(monkeypatch, rank):
    with free_port() as port:
        message = _init(monkeypatch, rank, port)
    assert f"ranks did not meet at 127.0.0.1:{port} within 2 s" in message
    assert "\n" not in message
