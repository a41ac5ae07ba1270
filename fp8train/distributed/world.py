"""The processes that train together: their rendezvous, their devices, and what they tell each other."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.errors import ConfigError

T = TypeVar("T")
Number = TypeVar("Number", float, Tensor)

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_SECONDS = 600.0
PATIENCE = timedelta(days=1)
# Gloo's threads let go of their last work after its result is there; one that does so while Python shuts down ends the
# process with SIGABRT (pytorch/pytorch#179291, seen once in 14 runs), and DDP keeps the threads beyond the group.
GLOO_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """One process's view of all of them. A single process is a world of size 1, and every call works there too.

    All ranks must make the same calls in the same order. As a context manager it closes itself; after an error it does
    not, because the other ranks may be waiting in a collective that this one left.

    rank, world_size: this process among all. local_rank: among those of its machine. device: where it trains.
    timeout_seconds: how long a rank waits for the others in a collective.
    patient: group in which ranks wait for what one does with files, which may take longer than that.
    meshes: of models that were sharded, by the ranks that share one out: a comparison shards several alike.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    timeout_seconds: float = TIMEOUT_SECONDS
    patient: Any = None
    meshes: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def all_reduce_sum(self, value: Number) -> Number:
        """Sum over ranks, the same bits on each; a tensor keeps its dtype, a Python number is summed in FP64."""
        if self.world_size == 1:
            return value
        total = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(total)
        return total if isinstance(value, Tensor) else total.item()

    def all_max(self, value: Number) -> Number:
        """Largest over ranks, element by element; NaN on any rank gives NaN (a MAX reduction of gloo may drop it)."""
        if self.world_size == 1:
            return value
        own = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(every, own.contiguous())
        largest = torch.stack(every).amax(0)
        return largest if isinstance(value, Tensor) else largest.item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        return self.all_reduce_sum(float(flag)) > 0

    def broadcast_object(self, value: T, *, patient: bool = False) -> T:
        """Rank 0's value, on every rank; what the others pass is ignored. Pickled: for small things.

        patient: wait PATIENCE for it, and not only the timeout of the other calls; a rank that dies ends the wait.
        """
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient if patient else None)
        return box[0]

    def all_gather_object(self, value: T, *, patient: bool = False) -> list[T]:
        """Every rank's value, in rank order, on every rank. Pickled: for small things. patient: as broadcast_object."""
        every: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(every, value, group=self.patient if patient else None)
        return every

    def close(self) -> None:
        """Leave the group; the world must not be used afterwards."""
        self.meshes.clear()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            if self.device.type == "cpu":
                time.sleep(GLOO_SECONDS)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def init(timeout_seconds: float = TIMEOUT_SECONDS, device_type: str | None = None) -> World:
    """Join the other processes, as torchrun's rendezvous variables say; without them, a world of one process.

    Args:
        timeout_seconds: how long a rank waits for the others, at start and in every collective.
        device_type: "cpu" or "cuda"; None takes CUDA where there is a GPU.

    Raises:
        ConfigError: rendezvous variables that are incomplete or contradict each other, a rank without a GPU of its own,
            a port that is in use, or ranks that do not come within the timeout.
    """
    rank, world_size, local_rank = read_rendezvous(os.environ)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device_type, _gpu_index(local_rank)) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patient = None
    if world_size > 1:
        _join(timeout_seconds, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=device,
        timeout_seconds=timeout_seconds,
        patient=patient,
    )


def read_rendezvous(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world_size, local_rank) from RANK, WORLD_SIZE and LOCAL_RANK; (0, 1, 0) without RANK and WORLD_SIZE.

    Raises:
        ConfigError: some variables are missing, not numbers, or out of range.
    """
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
        return 0, 1, 0
    missing = [name for name in RENDEZVOUS if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"distributed: {' and '.join(missing)} not set, RANK is {environment.get('RANK')} and WORLD_SIZE is "
            f"{environment.get('WORLD_SIZE')}; needs {', '.join(RENDEZVOUS)}. Start with torchrun, or unset RANK and "
            "WORLD_SIZE for a single process."
        )
    texts = [environment[name] for name in RENDEZVOUS[:3]]
    if not all(text.isdecimal() for text in texts):
        raise ConfigError(f"distributed: {_spelled(texts)}; needs whole numbers. Start with torchrun, which sets them.")
    rank, world_size, local_rank = (int(text) for text in texts)
    if rank >= world_size or local_rank >= world_size:
        raise ConfigError(
            f"distributed: {_spelled(texts)}; needs RANK and LOCAL_RANK below WORLD_SIZE. Start with torchrun, which "
            "sets them."
        )
    return rank, world_size, local_rank


def _spelled(texts: list[str]) -> str:
    return ", ".join(f"{name} is {text!r}" for name, text in zip(RENDEZVOUS, texts, strict=False))


def _gpu_index(local_rank: int) -> int:
    """The GPU of a local rank."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"distributed: local rank {local_rank} finds {count} GPUs on this machine; needs one for each rank. "
            f"Start with --nproc-per-node={max(count, 1)}."
        )
    return local_rank


def _join(timeout_seconds: float, backend: str) -> None:
    """Make the default process group."""
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # The restarts of a torchrun share its store, where a rank finds the address that its peer had before: it waits
        # there for the timeout (pytorch/pytorch#135712). Without that each restart has a store of its own, and agents
        # that count their restarts apart (--rdzv-backend=c10d on several machines) meet in it.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"distributed: port {os.environ['MASTER_PORT']} (MASTER_PORT) is in use; needs a free one. Set another "
                "MASTER_PORT, or start with torchrun --standalone, which finds one."
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        again = " Restarts of --rdzv-backend=c10d on several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."
        raise ConfigError(
            f"distributed: ranks did not meet at {where} within {timeout_seconds:g} s: {reason}; needs every rank to "
            "reach that address. Check MASTER_ADDR, MASTER_PORT and the log of the other ranks."
            f"{again if os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0' else ''}"
        ) from error
