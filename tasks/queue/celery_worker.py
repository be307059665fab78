"""Celery's worker, which takes a model's tickets (celery_app.py); only GPU workers import it.

Private interfaces in use: the thread pool's `ApplyResult.f` (when a thread is free), the hub's
`add_reader`, and `celery.worker.state.should_stop` (to end from any thread).
"""

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from celery.app.trace import setup_worker_optimizations
from celery.concurrency.thread import ApplyResult, TaskPool
from celery.worker import WorkController
from celery.worker import state as celery_state

from tasks.contract import keys
from tasks.queue.celery_app import ALONE, TICKET, get_celery


class _WakingPool(TaskPool):  # type: ignore[misc]
    """One that wakes Celery's event loop when its thread is free again.

    While that serves tickets Celery does not listen for any, and only checks whether it may listen
    again when its loop wakes, which nothing but a timer does, up to a second later: slots emptied
    in waves, at half the throughput.
    """

    _read_fd = _write_fd = -1

    def register_with_event_loop(self, hub: Any) -> None:
        """Celery's hook; called before the first ticket, and after each loss of the connection."""
        if self._read_fd < 0:
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


class TicketConsumer:
    """Takes a model's tickets, one at a time, in a thread of its own."""

    def __init__(self, model: str, serve_ticket: Callable[[str], None]) -> None:
        """`serve_ticket` is the Celery task: it is called with the model's name."""
        self._queue = keys.ticket_queue(model)
        celery = get_celery()
        celery.task(serve_ticket, name=TICKET, shared=False, bind=False)
        # Makes this app the current one of Celery's task threads; they find no tasks without it.
        setup_worker_optimizations(celery)
        self._controller: Any = WorkController(
            app=celery, queues=[self._queue], pool_cls=_WakingPool, concurrency=1, **ALONE
        )

    def run(self) -> None:
        """Celery's main loop, in the main thread, until `exit` is called."""
        self._controller.start()

    def stop(self) -> None:
        """Takes no more tickets; threads that serve one go on."""
        if consumer := self._controller.consumer:
            consumer.call_soon(consumer.cancel_task_queue, self._queue)

    @staticmethod
    def exit(exit_code: int) -> None:
        """Ends `run`, from any thread, also when it has not begun."""
        celery_state.should_stop = exit_code
