"""Which processors a process runs on: the front end keeps off those of a CPU engine.

On a machine without a GPU the engine computes on processors of its own, which vLLM binds. Whatever
else runs there takes time from every token: kept off, 64 streams got 30 requests/s instead of 21.
"""

import os
from contextlib import suppress

SPINNER_NICENESS = 10
# Elsewhere there is no such call, and no CPU build of vLLM either.
IS_SUPPORTED = hasattr(os, "sched_setaffinity")


def processors(pid: int) -> set[int]:
    """The processors that the process may run on.

    Raises:
        ProcessLookupError: it has ended.
    """
    return os.sched_getaffinity(pid)


def confine(pid: int, allowed: set[int]) -> None:
    """Restricts all threads of the process, and those that they start, to these processors."""
    for thread in _threads(pid):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, allowed)


def step_back(pid: int) -> None:
    """Lowers the priority of the process's threads on the processors that they share.

    vLLM's EngineCore spins while it waits for its worker. Beside it Redis waited up to 300 ms for
    the processor, and so did every token; with it at a lower priority less than 15 ms.
    """
    for thread in _threads(pid):
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, thread, SPINNER_NICENESS)


def _threads(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    return []
