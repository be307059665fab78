"""Starts the load client and follows it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.measurement import Load, Measurement

# There is no other `bench` for the client to find.
_HOME = Path(__file__).parent.parent


def run_client(load: Load, report: Callable[[int], None] = lambda _finished: None) -> Measurement:
    """Drives the load from a process of its own; reports the count of finished requests.

    Raises:
        CalledProcessError: the client failed; it has printed why.
    """
    command, last = [sys.executable, "-m", "bench.client"], "{}"
    with subprocess.Popen(
        command,
        cwd=_HOME,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A terminal's Ctrl-C is for this process, which ends the client silently.
        process_group=0,
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            client.stdin.write(load.encode())
            client.stdin.close()
            for last in client.stdout:
                if (finished := json.loads(last).get("finished")) is not None:
                    report(finished)
            client.wait()
        finally:
            client.kill()
    if client.returncode:
        raise subprocess.CalledProcessError(client.returncode, command)
    return Measurement.decode(last)
