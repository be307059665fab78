"""Looks up the names of webhooks when a job is submitted, without holding anybody up.

The system's lookup cannot be bounded or stopped, and gevent makes it in threads that the whole
process shares, connections to Redis included. Here it has threads of its own. Who finds none free,
or waits too long, goes on without an answer: each call of a webhook asks again, and decides.
"""

import socket
from typing import Any

from gevent.lock import Semaphore
from gevent.monkey import get_original
from gevent.threadpool import ThreadPool

from tasks.maintenance.targets import addresses_in

LOOKUP_S = 2.0
# A name server that is silent holds a thread for half a minute.
MOST_AT_ONCE = 4

# What gevent has put in its place would ask in the shared threads.
_getaddrinfo: Any = get_original("socket", "getaddrinfo")


class Lookups:
    """Those of an API process."""

    def __init__(self) -> None:
        self._threads = ThreadPool(MOST_AT_ONCE)
        self._free = Semaphore(MOST_AT_ONCE)

    def ask(self, name: bytes) -> list[str]:
        """The addresses of the name.

        Raises:
            OSError: it is not known, at least not within the time and the threads that there are.
        """
        # A pool without a free thread would have its caller wait for one.
        if not self._free.acquire(blocking=False):
            raise OSError("too many names are being looked up")
        answer = self._threads.spawn(_look_up, name)
        answer.rawlink(lambda _: self._free.release())
        answer.wait(LOOKUP_S)
        if not answer.ready():
            raise OSError(f"no address of the host within {LOOKUP_S:g} s")
        found: list[str] | OSError | None = answer.get()
        if isinstance(found, OSError):
            raise found
        return found or []


def _look_up(name: bytes) -> list[str] | OSError:
    try:
        return addresses_in(_getaddrinfo(name, None, type=socket.SOCK_STREAM))
    except OSError as failed:  # what is raised in such a thread gevent would also log
        return failed
