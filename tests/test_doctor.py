"""`sluice doctor`: what it reports of healthy parts, and of parts that are really broken."""

import os
import re
import resource
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
import yaml
from click.testing import CliRunner, Result

from bench.stack import Process, Stack, await_that, running, serving, slack
from deploy.cli import main
from deploy.doctor_servers import _judge_memory
from deploy.redis_server import answers, find_server, free_port, server_command
from tasks.contract import keys
from tasks.contract.models import get_catalog
from tasks.contract.settings import get_settings
from tests.conftest import SIM

PARTS = {
    *("settings", "models", "redis", "bus", "database", "workers", "maintenance", "ledger"),
    *("pauses", "dead letters", "model files", "api", "clock", "disk", "open files"),
}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


class Diagnosis:
    """The output of one run of the program."""

    def __init__(self, code: int, output: str) -> None:
        self.code = code
        self.findings: list[dict[str, str]] = orjson.loads(output)

    def of(self, check: str, level: str) -> str:
        """All that was found at that level by the check, with what to do."""
        return "\n".join(
            f"{finding['found']}; {finding['do']}"
            for finding in self.findings
            if (finding["check"], finding["level"]) == (check, level)
        )

    @property
    def wrong(self) -> set[str]:
        return {finding["check"] for finding in self.findings if finding["level"] == "wrong"}


def environment(stack: Stack, **env: str) -> dict[str, str]:
    api = {"SLUICE_API_URL": stack.url} if stack.api_ports else {}
    return stack.env | api | env


def sluice(stack: Stack, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        env=environment(stack, **env),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def invoke(stack: Stack, *arguments: str, **env: str) -> Result:
    """The same in this process: most tests need no other, which takes longer."""
    for read_once in (get_settings, get_catalog):
        read_once.cache_clear()
    try:
        return CliRunner().invoke(main, arguments, env=environment(stack, **env))
    finally:
        for read_once in (get_settings, get_catalog):
            read_once.cache_clear()


def diagnose(stack: Stack, **env: str) -> Diagnosis:
    done = invoke(stack, "doctor", "--json", **env)
    return Diagnosis(done.exit_code, done.stdout)


@contextmanager
def configured(stack: Stack, name: str, value: object) -> Iterator[None]:
    """The stack's Redis with another setting."""
    before: Any = stack.redis.config_get(name)
    stack.redis.config_set(name, value)  # type: ignore[arg-type]
    try:
        yield
    finally:
        stack.redis.config_set(name, before[name])


@pytest.fixture
def stack(sim_stack: Stack) -> Stack:
    """A deployment of which maintenance, too, has begun its work."""
    await_that(lambda: sim_stack.redis.exists(keys.MAINTENANCE))
    return sim_stack


def test_a_healthy_stack_has_a_line_for_each_part_and_nothing_wrong(stack: Stack) -> None:
    seen = diagnose(stack)
    assert (seen.code, seen.wrong) == (0, set())
    assert {finding["check"] for finding in seen.findings} == PARTS
    assert f"127.0.0.1:{stack.redis_port}/0 answers, " in seen.of("redis", "ok")
    assert "sim: 1 serving worker(s), 0 job(s) wait" in seen.of("workers", "ok")
    assert f"{socket.gethostname()}-{stack.part('maintenance').pid} lives" in seen.of(
        "maintenance", "ok"
    )
    assert "answers, and is ready" in seen.of("api", "ok")
    assert "at migration" in seen.of("database", "ok")
    assert "SQLite's journal is a WAL" in seen.of("database", "ok")


def test_people_get_one_line_per_finding_and_a_sum(stack: Stack) -> None:
    seen = diagnose(stack)
    done = sluice(stack, "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, total = done.stdout.splitlines()
    assert len(lines) == len(seen.findings)
    for line, finding in zip(lines, seen.findings, strict=True):
        assert line.startswith(f"{finding['level']:<8}{finding['check']}")
    assert total.endswith(", 0 wrong")


def test_a_redis_that_is_down_hides_nothing_else(stack: Stack) -> None:
    seen = diagnose(stack, SLUICE_REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    assert (seen.code, seen.wrong) == (1, {"redis"})
    assert "start it, or set SLUICE_REDIS_URL to where it runs" in seen.of("redis", "wrong")
    for needs_it in ("workers", "maintenance", "ledger", "pauses", "clock"):
        assert seen.of(needs_it, "warning") == "not checked without redis; mend redis first"
    assert "at migration" in seen.of("database", "ok")
    assert "is ready" in seen.of("api", "ok")


def test_servers_that_accept_connections_and_are_silent_are_waited_for_seconds_only(
    stack: Stack,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began_s = time.monotonic()
        seen = diagnose(
            stack,
            SLUICE_BUS_URL=f"redis://127.0.0.1:{port}/0",
            SLUICE_DATABASE_URL=f"postgresql+psycopg://postgres@127.0.0.1:{port}/x",
            SLUICE_API_URL=f"http://127.0.0.1:{port}",
        )
    assert time.monotonic() - began_s < slack(30)
    assert (seen.code, seen.wrong) == (1, {"bus", "database", "api"})
    assert "start it, or set SLUICE_BUS_URL" in seen.of("bus", "wrong")
    assert "start it, or set SLUICE_DATABASE_URL" in seen.of("database", "wrong")
    assert "1 serving" in seen.of("workers", "ok")


@contextmanager
def filled(stack: Stack, share: float) -> Iterator[None]:
    """The stack's Redis with that share of its maxmemory in use."""
    # So much that the connections which come and go are no share of it.
    stack.redis.set("ballast", b"x" * 2**25)
    try:
        used: Any = stack.redis.info("memory")
        with configured(stack, "maxmemory", int(used["used_memory"] / share)):
            yield
    finally:
        stack.redis.delete("ballast")


def test_a_redis_that_drops_jobs_is_wrong_and_one_that_forgets_a_warning(stack: Stack) -> None:
    with configured(stack, "appendonly", "no"):
        seen = diagnose(stack)
        assert (seen.code, seen.wrong) == (0, set())
        assert "a restart loses what waits and runs" in seen.of("redis", "warning")
        assert "`redis-cli config set appendonly yes`" in seen.of("redis", "warning")
        with configured(stack, "maxmemory-policy", "allkeys-lru"):
            seen = diagnose(stack)
    assert (seen.code, seen.wrong) == (1, {"redis"})
    assert "maxmemory-policy is allkeys-lru" in seen.of("redis", "wrong")
    assert "`redis-cli config set maxmemory-policy noeviction`" in seen.of("redis", "wrong")


@pytest.mark.parametrize(("share", "code", "level"), [(0.9, 0, "warning"), (0.98, 1, "wrong")])
def test_a_redis_that_is_getting_full(stack: Stack, share: float, code: int, level: str) -> None:
    with filled(stack, share):
        seen = diagnose(stack)
    assert seen.code == code
    assert "MiB in use" in seen.of("redis", level)
    assert "give it a greater maxmemory" in seen.of("redis", level)


@pytest.mark.parametrize(("used", "level"), [(50, "ok"), (85, "warning"), (97, "wrong")])
def test_a_redis_without_a_limit_has_its_machines_memory(used: int, level: str) -> None:
    remark = _judge_memory({"used_memory": used, "maxmemory": 0, "total_system_memory": 100})
    assert remark.level == level
    assert "no maxmemory is set" in remark.found
    assert ("set a maxmemory" in remark.do) == (level != "ok")


def test_a_replica_takes_no_writes(stack: Stack, home: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    command = [
        *server_command(find_server(), home, port),
        *("--replicaof", "127.0.0.1", str(stack.redis_port)),
    ]
    replica = Process(command, stack.env, home / "replica.log")
    try:
        await_that(lambda: answers(url))
        seen = diagnose(stack, SLUICE_BUS_URL=url)
    finally:
        replica.stop()
    assert (seen.code, seen.wrong) == (1, {"bus"})
    assert "a replica, which takes no writes; give the URL of its primary" in seen.of(
        "bus", "wrong"
    )


def test_a_state_directory_that_is_not_that_of_sluice_up(stack: Stack, home: Path) -> None:
    seen = diagnose(stack, SLUICE_HOME=str(home))
    assert (seen.code, seen.wrong) == (1, {"database"})
    assert f"there is no database at {home}/sluice.db" in seen.of("database", "wrong")
    assert "beside a `sluice up`, set SLUICE_HOME as it is there" in seen.of("database", "wrong")


def test_a_state_directory_that_others_can_look_into(stack: Stack, home: Path) -> None:
    home.chmod(0o755)
    assert f"`chmod 700 {home}`" in diagnose(stack, SLUICE_HOME=str(home)).of("settings", "warning")


@pytest.mark.parametrize(("key", "is_short"), [("a" * 15, True), ("a" * 16, False), ("", False)])
def test_an_admin_key_that_can_be_guessed_is_a_warning(
    stack: Stack, key: str, *, is_short: bool
) -> None:
    found = diagnose(stack, SLUICE_ADMIN_KEY=key).of("settings", "warning")
    assert ("SLUICE_ADMIN_KEY is short enough to guess" in found) is is_short


@contextmanager
def altered(stack: Stack, original: bytes, instead: bytes) -> Iterator[str]:
    """The URL of a relay to the stack's Redis, in whose answers one string is replaced."""

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", stack.redis_port)) as redis:
                answering = threading.Thread(target=self.answer, args=(redis,))
                answering.start()
                while asked := self.request.recv(65536):
                    redis.sendall(asked)
                redis.shutdown(socket.SHUT_WR)
                answering.join()

        def answer(self, redis: socket.socket) -> None:
            while answer := redis.recv(65536):
                self.request.sendall(re.sub(original, instead, answer))

    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay)) as relay:
        yield f"redis://127.0.0.1:{relay.server_address[1]}/0"


def test_a_redis_that_is_too_old(stack: Stack) -> None:
    with altered(stack, rb"redis_version:\d+", b"redis_version:6") as url:
        seen = diagnose(stack, SLUICE_REDIS_URL=url)
    assert (seen.code, seen.wrong) == (1, {"redis"})
    assert "Redis 6." in seen.of("redis", "wrong")
    assert "install Redis 7.0 or newer" in seen.of("redis", "wrong")


def test_clocks_that_differ(stack: Stack) -> None:
    # TIME answers seconds, of ten digits, and microseconds: here a thousand million seconds later.
    with altered(stack, rb"(\*2\r\n\$10\r\n)1", rb"\g<1>2") as url:
        seen = diagnose(stack, SLUICE_REDIS_URL=url)
    assert (seen.code, seen.wrong) == (0, set())
    assert re.search(
        r"(100000000\d|99999999\d)\.\d s behind that of Redis", seen.of("clock", "warning")
    )
    assert "have NTP set both clocks" in seen.of("clock", "warning")


def test_jobs_that_wait_for_a_worker_and_a_maintenance_that_died(home: Path) -> None:
    with running(Stack(home, [SIM]), workers=0) as stack:
        await_that(lambda: stack.redis.exists(keys.MAINTENANCE))
        seen = diagnose(stack)
        assert (seen.code, seen.wrong) == (0, set())
        assert "sim: no worker(s), 0 job(s) wait; start one" in seen.of("workers", "warning")
        assert "is not ready: no worker lives" in seen.of("api", "warning")

        job = {"endpoint": "/v1/chat/completions", "body": CHAT}
        assert requests.post(f"{stack.url}/v1/jobs", json=job, timeout=60).status_code == 202
        stack.part("maintenance").kill()
        stack.redis.expire(keys.MAINTENANCE, 1)  # its seconds pass faster
        await_that(lambda: not stack.redis.exists(keys.MAINTENANCE))
        seen = diagnose(stack)
        assert (seen.code, seen.wrong) == (1, {"workers", "maintenance"})
        assert "sim: no worker(s), 1 job(s) wait; start one" in seen.of("workers", "wrong")
        assert "`sluice worker --model sim`" in seen.of("workers", "wrong")
        assert "start it: `sluice maintenance`" in seen.of("maintenance", "wrong")

        (home / "other.yaml").write_text(yaml.safe_dump({"models": [SIM | {"name": "other"}]}))
        seen = diagnose(stack, SLUICE_MODELS=str(home / "other.yaml"))
        assert "sim: 1 job(s) wait, and models.yaml does not name it" in seen.of("workers", "wrong")


def test_a_paused_model_is_shown_with_the_way_back(stack: Stack) -> None:
    assert invoke(stack, "pause", "sim").exit_code == 0
    try:
        seen = diagnose(stack)
    finally:
        assert invoke(stack, "resume", "sim").exit_code == 0
    assert seen.code == 0
    assert seen.of("pauses", "warning") == "sim is paused; `sluice resume sim` ends that"
    assert diagnose(stack).of("pauses", "ok")


def test_an_api_that_is_not_there(stack: Stack) -> None:
    seen = diagnose(stack, SLUICE_API_URL=f"http://127.0.0.1:{free_port()}")
    assert (seen.code, seen.wrong) == (1, {"api"})
    assert "start one with `sluice api`, or set SLUICE_API_URL" in seen.of("api", "wrong")


class Stranger(BaseHTTPRequestHandler):
    """Something else than the API."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_port_that_something_else_has_taken(stack: Stack) -> None:
    with serving(HTTPServer(("127.0.0.1", 0), Stranger)) as stranger:
        seen = diagnose(stack, SLUICE_API_URL=f"http://127.0.0.1:{stranger.server_port}")
    assert (seen.code, seen.wrong) == (1, {"api"})
    assert f"does not answer as the API does by pid {os.getpid()}" in seen.of("api", "wrong")
    assert "end it or choose another SLUICE_PORT" in seen.of("api", "wrong")


def test_an_api_that_cannot_reach_redis(home: Path) -> None:
    stack = Stack(home, [SIM])
    try:
        stack.start_redis()
        stack.start_api()
        stack.part("redis").kill()
        elsewhere = server_command(find_server(), home / "elsewhere", port := free_port())
        stack._spawn("redis", elsewhere)
        url = f"redis://127.0.0.1:{port}/0"
        await_that(lambda: answers(url))
        seen = diagnose(stack, SLUICE_REDIS_URL=url)
    finally:
        stack.stop()
    assert seen.code == 1
    assert "is not ready: it cannot reach Redis" in seen.of("api", "wrong")


def test_a_broken_models_file_and_a_model_that_is_not_there(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models: [{name: a, sauce: b}]")
    seen = diagnose(stack, SLUICE_MODELS=str(file))
    assert (seen.code, seen.wrong) == (1, {"models"})
    assert "sauce" in seen.of("models", "wrong")
    assert "mend the file, or set SLUICE_MODELS" in seen.of("models", "wrong")
    assert "mend models first" in seen.of("workers", "warning")
    gone = {"name": "gone", "source": str(tmp_path / "gone")}
    file.write_text(yaml.safe_dump({"models": [SIM, gone]}))
    seen = diagnose(stack, SLUICE_MODELS=str(file))
    assert (seen.code, seen.wrong) == (0, set())
    assert f"there is no model at {tmp_path / 'gone'}" in seen.of("model files", "warning")


def test_few_open_files_are_a_warning(stack: Stack) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
    try:
        seen = diagnose(stack)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (seen.code, seen.wrong) == (0, set())
    assert "may open 1000 files" in seen.of("open files", "warning")
    assert "`ulimit -n 65536` before the API starts" in seen.of("open files", "warning")


def test_no_password_is_ever_shown(home: Path) -> None:
    stack = Stack(home, [SIM])
    own = {
        "SLUICE_API_KEY": "key-7f",
        "SLUICE_ADMIN_KEY": "admin-7f",
        "SLUICE_ALERT_WEBHOOK": "https://alerts.invalid/token-7f",
        "SLUICE_DATABASE_URL": f"postgresql+psycopg://me:sql-7f@127.0.0.1:{free_port()}/x",
        "SLUICE_API_URL": f"http://me:web-7f@127.0.0.1:{free_port()}",
    }
    command = server_command(find_server(), home, stack.redis_port)
    try:
        stack._spawn("redis", [*command, "--requirepass", "redis-7f"])
        address = f"127.0.0.1:{stack.redis_port}/0"
        urls = {
            f"redis://:redis-7f@{address}": f"redis://:…@{address} answers",
            f"redis://:wrong-7f@{address}": "give SLUICE_REDIS_URL a user and a password",
            f"redis://{address}": "give SLUICE_REDIS_URL a user and a password",
            f"redis://{address}?password=redis-7f": "?password=… answers",
        }
        await_that(lambda: answers(next(iter(urls))))
        for url, expected in urls.items():
            done = invoke(stack, "doctor", **own, SLUICE_REDIS_URL=url)
            assert done.exit_code == 1
            assert expected in done.output
            assert "no database answers at postgresql+psycopg://me:…@" in done.output
            assert "no API answers at http://me:…@" in done.output
            assert "7f" not in done.output
    finally:
        stack.stop()


@pytest.mark.parametrize("name", ["SLUICE_PORT", "SLUICE_PRT"])
def test_a_wrong_setting_is_one_sentence(stack: Stack, name: str) -> None:
    done = sluice(stack, "doctor", "--json", **{name: "x"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sluice: ")
    assert name in done.stderr
    assert len(done.stderr.splitlines()) == 1
