"""What vLLM's engine process does for itself when it starts (a vLLM general plugin).

vLLM loads its plugins in each of its processes; this one acts only in a direct child of a worker.
"""

import ctypes
import os
import signal
import sys

WORKER_PID_VARIABLE = "_SLUICE_WORKER_PID"
_PR_SET_PDEATHSIG = 1


def adopt() -> None:
    """Makes this process the worker whose engine processes `settle` looks for."""
    os.environ[WORKER_PID_VARIABLE] = str(os.getpid())


def settle() -> None:
    """Ties the engine process's life to its worker's.

    A killed worker would otherwise leave the engine holding the GPU's memory.
    """
    worker_pid = os.environ.get(WORKER_PID_VARIABLE)
    if worker_pid is None or int(worker_pid) != os.getppid():
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
