"""Logging costs its caller next to nothing: lines of a bounded size, written by a thread."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
import structlog

from bench.stack import Process, Stack, await_that, running, send, slack
from tasks.contract import keys, logs
from tasks.contract.job import State
from tests.conftest import SIM

SECRET = "sk-a-secret"

DEEP = """
def throw(depth=900, body="{secret}" * 100_000):
    if depth == 0:
        raise ValueError("deep")
    throw(depth - 1, [body] * 100)
"""
CHAIN = """
def throw(depth=100, body="{secret}"):
    try:
        raise KeyError(str(depth) * 1000)
    except KeyError as error:
        if depth == 0:
            raise ValueError("last") from error
        throw(depth - 1)
"""
GROUP = """
def throw(body="{secret}"):
    inner = [ValueError("x" * 10_000) for _ in range(5_000)]
    raise ExceptionGroup("group", [ExceptionGroup("inner", inner) for _ in range(10)])
"""
HUGE = """
def throw(body="{secret}"):
    raise ValueError("ü\\n" * 10_000_000)
"""
LOG = """
import logging, os, sys, time
from tasks.contract import logs
from tasks.contract.settings import Settings
logs.configure(Settings(log_format="{form}"))
log = logging.getLogger("api.test")
"""
TIMED = """
try:
    1 / 0
except ZeroDivisionError:
    log.exception("first")  # the renderer's first time
logs.flush() if hasattr(logs, "flush") else None
try:
    throw()
except Exception:
    begun_s = time.thread_time()
    log.exception("it failed")
    print(time.thread_time() - begun_s)
"""


def run(script: str, form: str = "json") -> subprocess.CompletedProcess[str]:
    """What a program that logs prints and logs."""
    program = (LOG + script).replace("{form}", form).replace("{secret}", SECRET)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize(
    "throw", [DEEP, CHAIN, GROUP, HUGE], ids=["deep", "chain", "group", "huge"]
)
def test_a_traceback_is_quick_and_short_whatever_was_thrown(throw: str, form: str) -> None:
    done = run(throw + TIMED, form)
    assert float(done.stdout) < 0.05
    written = done.stderr[done.stderr.index("it failed") :]
    assert 100 < len(written.encode()) < 16_384
    assert SECRET not in done.stderr
    assert "Traceback" in written
    assert "in throw" in written


def test_repeated_trouble_is_logged_once_with_its_count() -> None:
    done = run("""
for number in range(1000):
    try:
        raise ConnectionError(f"try {number}")
    except ConnectionError as error:
        log.exception("job %d: not cancelled", number)
        log.error("Redis: %s", error)
    log.info("job claimed", extra={"job": number})
    log.warning("job taken back", extra={"job": number})
log.error("Redis: %s", TimeoutError())
""")
    lines = [orjson.loads(line) for line in done.stderr.splitlines()]
    events = [line["event"] for line in lines]
    assert events.count("job claimed") == events.count("job taken back") == 1000
    trouble = [e for e in events if not e.startswith("job claimed") and e != "job taken back"]
    logged = ["job 0: not cancelled", "Redis: try 0", "Redis: "]
    assert trouble == [*logged, "again: job %d: not cancelled", "again: Redis: %s"]
    assert [line["left_out"] for line in lines if "left_out" in line] == [999, 999]


@pytest.mark.parametrize("form", ["json", "console"])
def test_what_was_asked_cannot_forge_a_line(form: str) -> None:
    forged = "x\\n2026-01-01 forged\\r\\u2028forged\\x1b[2J"
    script = f"""
log.error("GET %s failed", "{forged}")
log.info("job claimed", extra={{"model": "{forged}"}})
try:
    raise KeyError("{forged}")
except KeyError:
    log.exception("it failed")
"""
    written = run(script, form).stderr
    lines = written.replace("\r", "\n").split("\n")
    assert not [line for line in lines if line.startswith(("2026-01-01", "forged"))]
    assert "\x1b" not in written
    assert written.count("forged") >= 3


WITH_VALUES = """
import sqlalchemy
trouble = [
    ValueError("{secret}"), KeyError("{secret}"), TypeError("{secret}"), AssertionError("{secret}"),
    UnicodeDecodeError("utf-8", b"{secret}", 0, 1, "{secret}"),
    sqlalchemy.exc.IntegrityError("", None, Exception("no such row\\nDETAIL: {secret}")),
    ExceptionGroup("group", [ValueError("{secret}")]),
]
for error in trouble:
    log.error("it failed: %s", error)
    try:
        raise RuntimeError("out of memory") from error
    except RuntimeError:
        log.exception("it failed: %s", "again")
"""


@pytest.mark.parametrize("form", ["json", "console"])
def test_values_in_error_messages_are_content(form: str) -> None:
    written = run(WITH_VALUES, form).stderr
    assert SECRET not in written
    assert "out of memory" in written
    assert "no such row" in written
    shown = run("logs.configure(Settings(log_content=True))" + WITH_VALUES, form).stderr
    assert shown.count(SECRET) > 5


def test_all_lines_are_there_at_the_end_also_those_of_a_forked_child() -> None:
    done = run("""
for number in range(500):
    log.info("parent %d", number)
if os.fork():
    os.wait()
else:
    for number in range(500):
        log.info("child %d", number)
""")
    events = sorted(orjson.loads(line)["event"] for line in done.stderr.splitlines())
    assert events == sorted(f"{who} {n}" for who in ("parent", "child") for n in range(500))


def test_under_gevent_a_reader_that_reads_nothing_holds_up_nobody() -> None:
    program = (
        "from gevent import monkey; monkey.patch_all()\nimport gevent"
        + LOG
        + """
ticks = []
def tick():
    while True:
        ticks.append(time.perf_counter())
        gevent.sleep(0.01)
gevent.spawn(tick)
for number in range(200):
    for _ in range(100):
        log.info("a line of some length %d %s", number, "." * 1000)
    gevent.sleep(0.001)
print(max(b - a for a, b in zip(ticks, ticks[1:])))
"""
    )
    command = [sys.executable, "-c", program.replace("{form}", "json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            os.set_blocking(process.stdout.fileno(), False)
            await_that(lambda: process.stdout and process.stdout.peek())
            # Who waits for the reader waits for ever.
            assert float(process.stdout.readline()) < slack(2)
            # It ends, too, and what fits is written once the pipe is read again.
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_lines_that_had_no_room_are_counted() -> None:
    program = (
        LOG
        + """
for number in range(30_000):
    log.info("a line of some length %d %s", number, "." * 1000)
print("done", flush=True)
"""
    )
    command = [sys.executable, "-c", program.replace("{form}", "json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"done\n"
        lines = [orjson.loads(line) for line in process.stderr]
    left_out = [line["left_out"] for line in lines if "left_out" in line]
    assert sum(left_out) + len(lines) - len(left_out) == 30_000
    assert sum(left_out) > 5_000


class Unread(Process):
    """A part whose standard error is a pipe that nobody reads."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        self._is_asked = False
        self.popen = subprocess.Popen(
            command, env=env, stderr=subprocess.PIPE, start_new_session=True
        )


def test_streams_go_on_while_nobody_reads_the_log(home: Path) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    with running(Stack(home, [SIM])) as stack:
        port = stack.api_ports[0]
        stack.api_processes[0].stop()
        stack.processes.remove(stack.api_processes[0])
        command = [sys.executable, "-m", "deploy.cli", "api", "--bind", f"127.0.0.1:{port}"]
        api = Unread(command, stack.env, home / "none")
        try:
            _await_live(stack)
            # A line for each, more than the pipe holds.
            with requests.Session() as client:
                for _ in range(500):
                    url = f"{stack.url}/v1/chat/completions"
                    assert client.post(url, json=chat, timeout=30).status_code == 200
        finally:
            api.kill_all()
            api.popen.communicate()


def _await_live(stack: Stack) -> None:
    def is_live() -> bool:
        try:
            return requests.get(f"{stack.url}/health/live", timeout=1).ok
        except requests.RequestException:
            return False

    await_that(is_live)


@pytest.fixture
def slow_stack(home: Path) -> Iterator[Stack]:
    slow = SIM | {"args": {"tokens-per-s": 20, "first-token-s": 0.01}, "slots": 64}
    with running(Stack(home, [slow], keep_alive_s=1)) as stack:
        yield stack


def test_clients_that_leave_while_redis_is_away_do_not_silence_the_api(slow_stack: Stack) -> None:
    stack = slow_stack
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 20_000}
    clients = [send(stack, body | {"stream": True}) for _ in range(60)]
    for client in clients:
        client.settimeout(60)
        assert client.recv(4000)
    stack.part("redis").signal(signal.SIGSTOP)
    try:
        for client in clients:
            client.shutdown(socket.SHUT_RDWR)
            client.close()
        until_s = time.monotonic() + 12
        while (begun_s := time.monotonic()) < until_s:
            assert requests.get(f"{stack.url}/health/live", timeout=60).ok
            took_s = time.monotonic() - begun_s
            assert took_s < 1 or took_s < slack(1)
    finally:
        stack.part("redis").signal(signal.SIGCONT)
    # Long before their answers would be complete.
    await_that(lambda: stack.redis.zcard(keys.LEASES) == 0)
    log = stack.api_processes[0].log
    assert "not cancelled yet" in log.read_text()
    assert len(log.read_text()) < 100_000


FAILING = """
import logging
import click
from deploy.cli import Program
from tasks.contract import logs
from tasks.contract.errors import SluiceError
from tasks.contract.settings import get_settings

@click.group(cls=Program)
def main():
    pass

@main.command()
def fail():
    logs.configure(get_settings())
    # More than a pipe holds.
    for number in range(5_000):
        logging.getLogger("tasks").info("line %d", number)
    (get_settings().home / "failing").touch()
    raise SluiceError("what is wrong")

main()
"""


def test_why_a_part_ends_is_the_last_line_of_its_log(home: Path) -> None:
    program = [sys.executable, "-c", FAILING, "fail"]
    env = os.environ | {"SLUICE_HOME": str(home)}
    with subprocess.Popen(program, env=env, stderr=subprocess.PIPE, text=True) as part:
        await_that((home / "failing").exists)
        _, log = part.communicate(timeout=120)
    assert part.returncode == 2
    lines = log.splitlines()
    assert len(lines) == 5_001
    assert lines[-1] == "sluice: what is wrong"


def test_gunicorns_messages_are_lines_of_the_same_form(home: Path) -> None:
    with running(Stack(home, [SIM], log_format="json")) as stack:
        with socket.create_connection(("127.0.0.1", stack.api_ports[0]), timeout=10) as client:
            client.sendall(b"no HTTP at all\r\n\r\n")
            client.recv(1000)
        log = stack.api_processes[0].log
        await_that(lambda: "gunicorn.error" in log.read_text())
        lines = [line for line in log.read_text().splitlines() if "gunicorn.error" in line]
        assert orjson.loads(lines[0])["level"] == "warning"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "job": "job_1",
            "tenant": "two words",
            "attempt": 1,
            "none": None,
            "ratio": 0.5,
            "empty": "",
        },
        {"state": State.COMPLETED, "quoted": "it's", "pair": "a=b", "listed": ["a b"]},
    ],
)
def test_lines_for_people_are_as_structlog_writes_them(fields: dict[str, Any]) -> None:
    event: dict[str, Any] = {
        "timestamp": "2026-01-01T00:00:00Z",
        "level": "info",
        "logger": "api.test",
    }
    event |= {"event": "job claimed"} | fields
    write = structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0)
    assert logs._in_one_line(dict(event)) == write(None, "", dict(event))
