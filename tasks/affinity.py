"""Which processors a process runs on: the front end keeps off those of a CPU engine.

On a machine without a GPU the engine computes on processors of its own, which vLLM binds. Whatever
else runs there takes time from every token: kept off, 64 streams got 30 requests/s instead of 21.
"""

import os
from contextlib import suppress

# Elsewhere there is no such call, and no CPU build of vLLM either.
IS_SUPPORTED = hasattr(os, "sched_setaffinity")


def processors(pid: int) -> set[int]:
    """The processors that the process may run on.

    Raises:
        ProcessLookupError: it has ended.
    """
    return os.sched_getaffinity(pid)


def confine(pid: int, allowed: set[int]) -> None:
    """Has all threads of the process, and those that they start, run there only."""
    with suppress(ProcessLookupError, FileNotFoundError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), allowed)
