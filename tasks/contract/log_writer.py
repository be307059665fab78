"""Writes log lines from a thread of its own: a caller waits neither for a disk nor for a reader.

Under gevent too it is a thread of the operating system, beside the loop. It starts with the first
line: a process that forks before has none.
"""

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

# Lines that wait, together; those that come then are left out and counted.
MOST_BYTES = 16_000_000
# What `flush` waits at the end of a process.
LONGEST_FLUSH_S = 2.0
IDLE_S = 1.0
_NOT_READY_S = 0.01


def original(module: str, name: str) -> Any:
    """The standard library's own, also where gevent has put its own in its place."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey.get_original(module, name) if monkey else getattr(import_module(module), name)


class LogWriter:
    """A bounded queue of lines, and the thread that writes them to a file descriptor."""

    def __init__(
        self,
        descriptor: int,
        lines_left_out: Callable[[int], str],
        when_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """`lines_left_out` renders a count of lines; `when_idle` is called about every second."""
        self._descriptor = descriptor
        self._lines_left_out = lines_left_out
        self._when_idle = when_idle
        self._lock = original("_thread", "RLock")()
        self._queue = original("queue", "SimpleQueue")()
        self._waiting_bytes = 0
        self._left_out = 0
        self._has_thread = False

    def put(self, line: str) -> None:
        """Has the line written soon; never waits."""
        data = line.encode(errors="replace") + b"\n"
        with self._lock:
            if not self._has_thread:
                original("_thread", "start_new_thread")(self._write_for_ever, ())
                self._has_thread = True
            if self._waiting_bytes + len(data) > MOST_BYTES:
                self._left_out += 1
                return
            self._waiting_bytes += len(data)
            self._queue.put(data)

    def flush(self, timeout_s: float = LONGEST_FLUSH_S) -> bool:
        """Waits until what was put is written; False: it is not, after that time."""
        with self._lock:
            if not self._has_thread:
                return True
            written = original("_thread", "allocate_lock")()
            written.acquire()
            self._queue.put(written)
        return bool(written.acquire(timeout=timeout_s))

    def _write_for_ever(self) -> None:
        empty, now = original("queue", "Empty"), time.monotonic
        next_idle_s = now() + IDLE_S
        while True:
            try:
                item = self._queue.get(timeout=IDLE_S)
            except empty:
                item = b""
            if isinstance(item, bytes):
                self._write(item)
            else:
                item.release()
            if now() >= next_idle_s:
                self._when_idle()
                next_idle_s = now() + IDLE_S

    def _write(self, data: bytes) -> None:
        _write_all(self._descriptor, data)
        with self._lock:
            self._waiting_bytes -= len(data)
            left_out, self._left_out = self._left_out, 0
        if left_out:
            _write_all(self._descriptor, self._lines_left_out(left_out).encode() + b"\n")


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            # Another process has made the pipe non-blocking.
            original("time", "sleep")(_NOT_READY_S)
        except OSError:
            return  # nobody will read it any more
