"""Processes that train together. The only place that reads the rendezvous variables (RANK, WORLD_SIZE, ...)."""

from __future__ import annotations

from fp8train.distributed.ddp import gradient_sync, unwrap, wrap_ddp
from fp8train.distributed.launch import check_single, rank_exit_code
from fp8train.distributed.world import World, init

__all__ = ["World", "check_single", "gradient_sync", "init", "rank_exit_code", "unwrap", "wrap_ddp"]
