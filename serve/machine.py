"""What this process may use: processors by affinity and quota, memory by limit. Linux, cgroup v1 and v2."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def cpu_quota() -> tuple[int, str]:
    """(threads that can really run at once, why)."""
    affinity = len(os.sched_getaffinity(0))
    quota = _read(CGROUP / "cpu.max")  # v2: "200000 100000" or "max 100000"
    if not quota:
        quota = _read(CGROUP / "cpu/cpu.cfs_quota_us") + _read(CGROUP / "cpu/cpu.cfs_period_us")
    if len(quota) == 2 and quota[0] not in ("max", "-1"):
        limit = max(1, math.floor(int(quota[0]) / int(quota[1])))
        if limit < affinity:
            return limit, "the cgroup's CPU quota"
    return affinity, "the processors this process may use"


def processor() -> str:
    """Its name, as the kernel tells it."""
    names = (line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    return next(names, platform.machine()).strip()


def available_bytes() -> int:
    """Memory that can still be taken without swapping or passing the cgroup's limit."""
    info = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    free = int(info["MemAvailable"]) * 1024
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(CGROUP / limit_file), _read(CGROUP / used_file)
        if limit and used and limit[0] != "max":
            free = min(free, int(limit[0]) - int(used[0]))
    return free


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
