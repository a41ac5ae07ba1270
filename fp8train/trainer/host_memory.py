"""Memory of the host that this process can still have: what Linux can make available, within the limits of its job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMORY_FILE = Path("/proc/meminfo")
GROUPS_FILE = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# files of a control group of version 2 and 1: limit, what is used, and the lines of memory.stat that can be freed
VERSIONS = {
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}


def free_host_bytes() -> int | None:
    """Bytes, swap included; None where that is not known.

    The limits of control groups are Slurm's --mem, and a container's: whoever exceeds one is killed.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    if not MEMORY_FILE.is_file():
        return None
    lines = (line.split() for line in MEMORY_FILE.read_text(encoding="ascii").splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    if "MemAvailable" not in kib:
        return None
    return min([1024 * (kib["MemAvailable"] + kib.get("SwapFree", 0)), *_left_of_limits()])


def _left_of_limits() -> Iterator[int]:
    """Of every limit on this process's group and on those around it, what is left of it."""
    try:
        memberships = [line.split(":", 2) for line in GROUPS_FILE.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for number, controllers, path in memberships:
        if number == "0":
            version, root = 2, GROUPS
        elif "memory" in controllers.split(","):
            version, root = 1, GROUPS / "memory"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (left := _left(folder, version)) is not None:
                yield left


def _left(folder: Path, version: int) -> int | None:
    """None where the group has no limit, or is not to be seen from here."""
    limit_file, used_file, freeable = VERSIONS[version]
    try:
        limit = (folder / limit_file).read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((folder / used_file).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - used + sum(int(stat.get(name, 0)) for name in freeable))
