"""Celery's thread pool, made to take the next ticket as soon as a thread is free."""

import os
from concurrent.futures import Future
from typing import Any

from celery.concurrency.thread import ApplyResult, TaskPool


class SlotPool(TaskPool):  # type: ignore[misc]
    """A thread per slot; one that gets free wakes Celery's event loop.

    With all threads busy Celery stops listening for tickets, and only looks whether it may listen
    again when its loop wakes, which nothing but a timer does, up to a second later: slots emptied
    in waves, at half the throughput.
    """

    def register_with_event_loop(self, hub: Any) -> None:
        """Celery's hook; called once, before the first ticket."""
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)
        hub.add_reader(self._read_fd, self._drain)

    def on_apply(self, *args: Any, **kwargs: Any) -> ApplyResult:
        """Runs a task, and wakes the loop after all that Celery does at its end."""
        result = super().on_apply(*args, **kwargs)
        result.f.add_done_callback(self._wake)
        return result

    def _wake(self, _done: "Future[Any]") -> None:
        try:
            os.write(self._write_fd, b"\0")
        except BlockingIOError:
            return  # full of wake-ups that are still to be read

    def _drain(self) -> None:
        os.read(self._read_fd, 65_536)
