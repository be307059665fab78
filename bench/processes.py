"""CPU time and memory of a process tree, by the role of each process."""

import re
from collections import defaultdict
from dataclasses import dataclass

import psutil

# The first pattern that a process's title or command line matches names its role; a process that
# matches none has its parent's.
ROLES = (
    (re.compile(r"VLLM::EngineCore"), "EngineCore"),
    (re.compile(r"VLLM::Worker"), "EngineCore's worker"),
    (re.compile(r"bin/litellm|bin/vllm-router|vllm::router"), "gateway"),
    (re.compile(r"gunicorn|deploy\.cli api"), "api"),
    (re.compile(r"deploy\.cli worker"), "worker"),
    (re.compile(r"deploy\.cli maintenance|celery"), "maintenance"),
    (re.compile(r"(redis|valkey)-server"), "redis"),
    (re.compile(r"deploy\.cli up"), "up"),
    (re.compile(r"vllm\.entrypoints"), "front end"),
)


@dataclass(frozen=True)
class Usage:
    """What one process has used up to now."""

    role: str
    cpu_s: float  # user and system
    rss_mb: float  # resident memory, 10^6 bytes
    niceness: int


Snapshot = dict[int, Usage]  # by process id


def snapshot(root_pid: int) -> Snapshot:
    """The tree as it is now, without processes that just ended."""
    found: Snapshot = {}
    _collect(psutil.Process(root_pid), "other", found)
    return found


def _collect(process: psutil.Process, parents_role: str, found: Snapshot) -> None:
    try:
        with process.oneshot():
            role = _role(" ".join(process.cmdline()), parents_role)
            times = process.cpu_times()
            rss_mb = process.memory_info().rss / 1e6
            cpu_s = times.user + times.system
            found[process.pid] = Usage(role, cpu_s, rss_mb, int(process.nice()))
        children = process.children()
    except psutil.NoSuchProcess:
        return
    for child in children:
        _collect(child, role, found)


def _role(command_line: str, parents_role: str) -> str:
    return next((role for pattern, role in ROLES if pattern.search(command_line)), parents_role)


def cpu_between_s(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """CPU seconds that each role used between two snapshots."""
    used: dict[str, float] = defaultdict(float)
    for pid, usage in after.items():
        earlier_s = before[pid].cpu_s if pid in before else 0.0
        used[usage.role] += usage.cpu_s - earlier_s
    return dict(used)


def largest_rss_mb(taken: Snapshot, role: str) -> float:
    """Resident memory of the role's largest process; 0 without one."""
    return max((usage.rss_mb for usage in taken.values() if usage.role == role), default=0.0)


def niceness(taken: Snapshot) -> dict[str, int]:
    """The lowest priority of each role."""
    return {
        usage.role: max(other.niceness for other in taken.values() if other.role == usage.role)
        for usage in taken.values()
    }
