"""Several front ends over one engine: each a process with an interpreter of its own.

this process                        a front end, as many as the model's entry says
starts the engine, watches it       a worker (worker.py) for its share of the slots
starts the front ends          -->  attaches to the engine
replaces one that was killed        claims, publishes, renews its leases, all by itself
passes a signal on             -->  drains, and ends with 0
tells of the engine's death    -->  hands its jobs on, and ends with 1

To the queue each front end is a worker: a killed one loses its leases, and its jobs alone move on.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from gpu_worker import orphans, shutdown
from gpu_worker.engines.engine import Core, Seat, open_core
from gpu_worker.parent import end_with_parent
from gpu_worker.worker import Worker, prepare
from tasks.contract import logs
from tasks.contract.errors import SluiceError
from tasks.contract.models import Model
from tasks.contract.settings import get_settings

log = logging.getLogger(__name__)

SERVES = b"serves"
ENGINE_DIED = b"engine died"
# What a front end may take beyond the limit after which it ends by itself.
MOST_ENDING_S = shutdown.FORCED_EXIT_S + 2.0


def run(model: Model) -> int:
    """Serves the model until a signal, or until no front end is left; returns the exit code.

    Raises:
        SluiceError: the engine cannot be loaded.
    """
    return asyncio.run(FrontEnds(model).run())


@dataclass
class FrontEnd:
    """One of them, as the process sees it that started it."""

    place: int
    seat: Seat
    process: BaseProcess
    link: Connection
    """Both ends end with their processes."""
    replaces: Seat | None
    """That of the one whose place it takes."""
    serves: bool = False


class FrontEnds:
    """Starts, replaces and ends the front ends of one engine."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._settings = get_settings()
        self._core: Core
        self._processes = multiprocessing.get_context("spawn")
        self._running: list[FrontEnd] = []
        self._is_loaded = False
        self._is_stop_asked = False
        self._has_lost_engine = False
        self._exit_code: int | None = None
        """Set when all are to end."""
        self._kill_at_s = float("inf")

    async def run(self) -> int:
        """Loads the engine, then serves until no front end is left."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        async with open_core(self._model) as self._core:
            logs.take_over_loggers()
            with orphans.recorded():
                self._is_loaded = True
                try:
                    for place in range(self._model.frontends):
                        self._start(place)
                    return await self._watch()
                finally:
                    if self._running:  # an error: Python would wait for them
                        shutdown.kill_children()

    async def _watch(self) -> int:
        watch = shutdown.Watch(self._core, self._settings.engine_stall_s)
        while self._running:
            await asyncio.sleep(shutdown.CHECK_S)
            if not self._has_lost_engine and (reason := watch.failure()):
                self._give_up_engine(reason)
            if self._is_stop_asked and self._exit_code is None:
                self._end(0)
            for front_end in list(self._running):
                self._look_at(front_end)
            if time.monotonic() > self._kill_at_s:
                shutdown.kill_children()
        if self._exit_code:
            # A hung engine reacts to nothing else.
            shutdown.kill_children()
        return self._exit_code or 0

    def _give_up_engine(self, reason: str) -> None:
        """Has all front ends hand on their jobs and end."""
        log.error("%s; the worker ends and its jobs run elsewhere", reason)
        self._has_lost_engine = True
        self._exit_code = 1
        self._kill_at_s = time.monotonic() + MOST_ENDING_S
        for front_end in self._running:
            if not front_end.serves:
                front_end.process.kill()  # it waits for the engine, and for nothing else
            with suppress(OSError):
                front_end.link.send_bytes(ENGINE_DIED)

    def _look_at(self, front_end: FrontEnd) -> None:
        """Notices that it serves, or has ended; one that was killed is replaced."""
        # Looked at first: one that serves and ends in between would seem never to have served.
        has_ended = front_end.process.exitcode is not None
        if not front_end.serves and _reports(front_end.link):
            front_end.serves = True
            if front_end.replaces is not None:
                # What was on its way to the engine when the other one died is there by now.
                self._core.clear(front_end.replaces)
        if has_ended:
            self._running.remove(front_end)
            front_end.link.close()
            self._core.clear(front_end.seat)
            self._replace(front_end)

    def _replace(self, front_end: FrontEnd) -> None:
        code = front_end.process.exitcode
        if self._exit_code is not None:
            return
        if code == 0:
            log.info("front end %d was drained, and with it the worker is", front_end.place)
            self._end(0)
            return
        log.error("front end %d ended with exit code %s", front_end.place, code)
        if not front_end.serves:
            log.error("it could not begin to serve; the worker ends")
            self._end(1)
        elif not self._start(front_end.place, front_end.seat):
            log.error("too many of them have ended; the worker ends")
            self._end(1)

    def _start(self, place: int, replaces: Seat | None = None) -> bool:
        """Starts a front end, in the main thread, which lives as long as this process.

        False: the engine takes no more of them.
        """
        if (seat := self._core.take_seat()) is None:
            return False
        ours, theirs = self._processes.Pipe()
        process = self._processes.Process(
            target=serve, args=(self._model, place, seat, theirs), name=f"front end {place}"
        )
        process.start()
        theirs.close()
        self._running.append(FrontEnd(place, seat, process, ours, replaces))
        return True

    def _end(self, exit_code: int) -> None:
        """Has all of them drain, each by its own limit."""
        self._exit_code = exit_code
        self._kill_at_s = time.monotonic() + self._settings.drain_s + MOST_ENDING_S
        for front_end in self._running:
            if front_end.process.exitcode is None:
                front_end.process.terminate()

    def _on_signal(self, number: int, _frame: object) -> None:
        if not self._is_loaded:
            os._exit(0)  # nothing is claimed yet; a load may take minutes
        log.info("%s: draining", signal.Signals(number).name)
        self._is_stop_asked = True


def _reports(link: Connection) -> bool:
    """Whether the front end has said that it serves."""
    with suppress(EOFError, OSError):
        return link.poll() and link.recv_bytes() == SERVES
    return False


def serve(model: Model, place: int, seat: Seat, link: Connection) -> None:
    """The process of a front end."""
    end_with_parent()
    try:
        prepare()
        report = lambda: link.send_bytes(SERVES)
        worker = Worker(model.share(place), seat, place, report)
        following = threading.Thread(
            target=_follow, args=(link, worker.has_lost_engine.set), name="the link", daemon=True
        )
        following.start()
        sys.exit(worker.run())
    except SluiceError as wrong:
        print(f"sluice: {wrong}", file=sys.stderr)
        sys.exit(1)


def _follow(link: Connection, on_engine_died: Callable[[], None]) -> None:
    """Until the process that has the engine ends: without the engine there is nothing to do."""
    try:
        while link.recv_bytes() == ENGINE_DIED:
            on_engine_died()
    except (EOFError, OSError):
        logs.flush()
        os._exit(1)
