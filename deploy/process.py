"""Child processes of `sluice up`: started with a log, restarted, ended with all they started."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from gpu_worker import affinity

GRACE_S = 6.0
REDIS_GRACE_S = 2.5
SLOWEST_RESTART_S = 30.0
HEALTHY_AFTER_S = 60.0
LOG_LINES_SEARCHED = 50
PREFIX = "sluice: "

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Part:
    """One part of Sluice as a process in a session of its own."""

    def __init__(self, name: str, command: list[str], log: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._failures = 0
        self._restart_at: float | None = None

    def start(self) -> None:
        """Starts the process; its output is appended to its log.

        In its own session it does not get the terminal's Ctrl-C, and can be ended as a group.
        """
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Safe: this program has no threads, and the main thread lives as long as it does.
                preexec_fn=_end_with_parent,  # noqa: PLW1509
            )
        self._started_at = time.monotonic()
        self._restart_at = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def exit_code(self) -> int | None:
        """How the process ended; None while it runs, or before its first start."""
        return self._process.poll() if self._process else None

    def keep_alive(self, report: Callable[[str], None]) -> None:
        """Starts the process again if it has ended, after a pause that grows with its failures."""
        code = self.exit_code()
        if code is None:
            return
        now = time.monotonic()
        if self._restart_at is None:
            ran_s = now - self._started_at
            self._failures = 0 if ran_s > HEALTHY_AFTER_S else self._failures
            pause = min(2.0**self._failures, SLOWEST_RESTART_S)
            self._failures += 1
            self._restart_at = now + pause
            self.kill_group()
            report(
                f"{self.name} ended with exit code {code} after {ran_s:.0f} s; "
                f"starting it again in {pause:.0f} s (log: {self.log})"
            )
        elif now >= self._restart_at:
            self.start()

    def follow(self, leader: "Part") -> None:
        """Moves to the leader's processors: a worker keeps off those of its CPU engine."""
        if leader.pid is None or self.pid is None or not affinity.IS_SUPPORTED:
            return
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            allowed = affinity.processors(leader.pid)
            own = psutil.Process(self.pid)
            for process in (own, *own.children(recursive=True)):
                if affinity.processors(process.pid) != allowed:
                    affinity.confine(process.pid, allowed)

    def terminate(self) -> None:
        """Asks the process, not its group, to end: it ends its own children in its own order."""
        if self._process and self.exit_code() is None:
            self._process.terminate()

    def kill_group(self) -> None:
        """Ends at once what is left of the process and of all that it started."""
        if self._process:
            # macOS reports "not permitted" where only zombies are left.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def reason(self) -> str:
        """Why it ended: the error that all of Sluice's programs print last; '' without one."""
        tail = self.log_tail(LOG_LINES_SEARCHED)
        return next((line[len(PREFIX) :] for line in reversed(tail) if line.startswith(PREFIX)), "")

    def log_tail(self, lines: int) -> list[str]:
        """The last lines of the log; a progress bar counts as one line."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
            text = log.read().decode(errors="replace")
        rows = [line.rsplit("\r", 1)[-1].rstrip() for line in text.rstrip().split("\n")]
        return [row for row in rows if row][-lines:]


def stop_all(parts: list[Part], redis: Part | None) -> None:
    """Ends all parts, Redis last: the others deregister there."""
    _stop(parts, GRACE_S)
    _stop([redis] if redis else [], REDIS_GRACE_S)


def _stop(parts: list[Part], grace_s: float) -> None:
    running = [part for part in parts if part.exit_code() is None]
    for part in running:
        part.terminate()
    deadline = time.monotonic() + grace_s
    while any(part.exit_code() is None for part in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    for part in parts:
        part.kill_group()


def _end_with_parent() -> None:
    """Makes the kernel end this process when `sluice up` dies without ending it."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
