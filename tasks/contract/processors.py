"""How many processors this process may use."""

import os
from pathlib import Path

# Of a container (cgroup v2): microseconds of processor time, or `max`, in each period of so many.
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count(quota: Path = QUOTA) -> int:
    """Those that it may run on, or as many as its container's quota is worth; at least one."""
    return max(1, min(_allowed(), _in_quota(quota)))


def _allowed() -> int:
    # macOS has no such call.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _in_quota(quota: Path) -> int:
    try:
        time_us, period_us = quota.read_text().split()
        return int(time_us) // int(period_us)
    except (OSError, ValueError):  # there is none, or no limit in it
        return os.cpu_count() or 1
