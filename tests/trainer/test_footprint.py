"""A model that cannot fit is refused with the arithmetic, one that can is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8train import train
from fp8train.distributed import World
from fp8train.errors import ConfigError, exit_code
from fp8train.models import count_parameters
from fp8train.trainer import footprint, host_memory
from fp8train.trainer.footprint import check_memory, free_bytes
from tests.hardware import requires_gpu
from tests.tiny_run import tiny_arguments, tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(("moments", "each"), [("fp32", 16), ("bf16", 12)])
def test_weights_gradients_and_moments_must_fit_to_the_byte(
    moments: str, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(tmp_path, f"optim.moments={moments}")
    needed = each * count_parameters(config.model)
    monkeypatch.setattr(footprint, "free_bytes", lambda device: needed)
    check_memory(config, World())
    monkeypatch.setattr(footprint, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ConfigError, match=r"not fit: .* free; needs .* FP32 weights, as much of gradients, .*fsdp"):
        check_memory(config, World())


class SeveralRanks(World):
    """Rank 0 of several; the others have so much free."""

    def all_gather_object(self, value):
        return [value, 1 << 60]


@pytest.mark.parametrize(("ranks", "remedy"), [(2, ""), (4, r"shard it over more ranks \(parallel.shard_ranks\), or ")])
def test_sharded_rank_needs_its_half_and_the_fullest_decides(
    ranks: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(tmp_path, "parallel=fsdp", "parallel.shard_ranks=2")
    half = 8 * count_parameters(config.model)  # every first dimension is even, but for the 257 tokens of the vocabulary
    for free in (half * 1.05, half * 0.95):
        monkeypatch.setattr(footprint, "free_bytes", lambda device, free=free: int(free))
        if free > half:
            check_memory(config, SeveralRanks(world_size=ranks))
        else:
            with pytest.raises(ConfigError, match=f"smaller model, or {remedy}keep moments in BF16 "):
                check_memory(config, SeveralRanks(world_size=ranks))


def test_unknown_memory_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_memory, "MEMORY_FILE", tmp_path / "none")
    assert free_bytes(CPU) is None
    check_memory(tiny_config(tmp_path, "model.hidden_size=1000000"), World())


def test_memory_of_a_cpu_is_what_linux_can_free_and_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable: 500 kB\nSwapFree: 30 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(host_memory, "MEMORY_FILE", file)
    monkeypatch.setattr(host_memory, "GROUPS_FILE", tmp_path / "none")
    assert free_bytes(CPU) == 530 * 1024


LIMITS = {
    "of its own group": ({"slurm/job_1": "300000"}, 300_000 - 100_000 + 7_000),
    "of a group around it": ({"slurm/job_1": "max", "slurm": "200000"}, 200_000 - 100_000 + 7_000),
    "the least of several": ({"slurm/job_1": "400000", "slurm": "250000", "": "300000"}, 157_000),
    "that is used up": ({"slurm": "90000"}, 0),
    "none": ({"slurm/job_1": "max"}, 530 * 1024),
    "larger than the memory": ({"slurm/job_1": "9223372036854771712"}, 530 * 1024),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("limits", "free"), LIMITS.values(), ids=LIMITS)
def test_memory_of_a_job_ends_at_its_limit(
    limits: dict[str, str], free: int, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What files take in the cache does not count: Linux frees it."""
    if version == 1:
        limits = {group: limit.replace("max", "9223372036854771712") for group, limit in limits.items()}
    (tmp_path / "meminfo").write_text("MemAvailable: 500 kB\nSwapFree: 30 kB\n")
    membership = {2: "0::/slurm/job_1\n", 1: "9:name=systemd:/\n4:cpu,memory:/slurm/job_1\n0::/\n"}[version]
    (tmp_path / "cgroup").write_text(membership)
    limit_file, used_file, (active, inactive) = host_memory.VERSIONS[version]
    for group, limit in limits.items():
        folder = tmp_path / "groups" / ("memory" if version == 1 else "") / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / used_file).write_text("100000\n")
        (folder / "memory.stat").write_text(f"anon 9\n{active} 3000\n{inactive} 4000\nshmem 5\n")
    for name, path in {"MEMORY_FILE": "meminfo", "GROUPS_FILE": "cgroup", "GROUPS": "groups"}.items():
        monkeypatch.setattr(host_memory, name, tmp_path / path)
    assert free_bytes(CPU) == free


@requires_gpu()
def test_memory_that_the_cuda_allocator_holds_idle_counts_as_free():
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = free_bytes(device)
    block = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    del block
    assert before is not None and abs((free_bytes(device) or 0) - before) < 1 << 26


def test_command_says_it_in_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert exit_code(train.main, tiny_arguments(tmp_path, "model.hidden_size=1000000")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "parameters does not fit: the cpu of a rank has" in error
    assert "take a smaller model, or spread it over several ranks with parallel=fsdp" in error
    assert not (tmp_path / "run").exists()
