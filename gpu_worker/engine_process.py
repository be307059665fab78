"""What each of vLLM's engine processes does for itself when it starts (a vLLM general plugin).

vLLM loads its plugins in each of its processes; this one acts only in those that a worker of
Sluice has started: EngineCore, and EngineCore's own workers.
"""

import ctypes
import os
import signal
import sys

WORKER_PID_VARIABLE = "_SLUICE_WORKER_PID"
_PR_SET_PDEATHSIG = 1


def adopt() -> None:
    """Makes this process the worker whose engine processes `settle` ties to it."""
    os.environ[WORKER_PID_VARIABLE] = str(os.getpid())


def settle() -> None:
    """Ties the engine process's life to that of its parent, and by that to the worker's.

    A killed worker would otherwise leave the engine holding the GPU's memory: EngineCore's workers
    look for its death themselves, but not while they hang.
    """
    worker_pid = os.environ.get(WORKER_PID_VARIABLE)
    if worker_pid is None or int(worker_pid) == os.getpid():
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
