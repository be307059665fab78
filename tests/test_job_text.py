"""`sluice job`, `jobs` and what `watch` ends with, as people read them: the real program."""

import os
import pty
import re
import signal
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import orjson
import pytest
import requests

from bench.stack import Stack, await_that, running
from tests.conftest import SIM
from tests.test_client import LONG, PROMPT, command, sluice, submit

LONG_NAME = "meta-llama/Meta-Llama-3-8B-Instruct"
FAILING = '{"message": "Hello", "stream": true, "sim": {"failure": "error"}}'
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def in_terminal(stack: Stack, *arguments: str, columns: int = 80) -> list[str]:
    """The lines that a terminal of that width gets."""
    terminal, its_end = pty.openpty()
    start = command(stack, *arguments)
    start["env"] |= {"TERM": "xterm", "COLUMNS": str(columns)}
    with subprocess.Popen(**start, stdout=its_end, stderr=subprocess.PIPE) as program:
        os.close(its_end)
        shown = b""
        try:
            while piece := os.read(terminal, 4096):
                shown += piece
        except OSError:  # Linux's error when the other end is closed
            pass
        assert program.wait(60) == 0
    os.close(terminal)
    return re.sub(r"\x1b\[\d*m", "", shown.decode()).splitlines()


def facts(lines: list[str]) -> dict[str, str]:
    return {line[:11].strip(): line[11:] for line in lines if line[:11].strip()}


def test_a_job_is_shown_with_its_timeline(sim_stack: Stack) -> None:
    terms = "--max-tokens", "6", "--priority", "-5", "--metadata", "team=blue"
    job = submit(sim_stack, PROMPT, *terms)
    assert sluice(sim_stack, "watch", job).returncode == 0
    shown = facts(sluice(sim_stack, "job", job).stdout.splitlines())
    assert shown["id"] == job
    assert shown["status"] == "completed"
    assert (shown["model"], shown["endpoint"]) == ("sim", "/v1/chat/completions")
    assert (shown["priority"], shown["attempts"]) == ("-5", "1")
    assert re.fullmatch(rf"{TIME}, \d+[sm] ago", shown["submitted"])
    assert re.fullmatch(rf"{TIME}, waited \d+s", shown["started"])
    assert re.fullmatch(rf"{TIME}, ran \d+s", shown["ended"])
    assert shown["tokens"].endswith(", 6 completion")
    assert shown["metadata"] == "team=blue"
    assert "error" not in shown
    shown_json = orjson.loads(sluice(sim_stack, "job", job, "--json").stdout)
    assert (shown_json["id"], shown_json["object"], shown_json["priority"]) == (job, "job", -5)


def test_a_failed_job_shows_why(sim_stack: Stack) -> None:
    job = submit(sim_stack, "--body", "-", stdin=FAILING)
    watched = sluice(sim_stack, "watch", job)
    assert watched.returncode == 1
    assert watched.stderr == f"sluice: {job} failed: Internal server error\n"
    shown = facts(sluice(sim_stack, "job", job).stdout.splitlines())
    assert shown["status"] == "failed"
    assert shown["error"].startswith("Internal server error")


def test_a_refused_job_watched_later_still_fails_the_watch(sim_stack: Stack) -> None:
    job = submit(sim_stack, "--body", "-", stdin='{"message": "Hello", "max_tokens": -1}')
    for _ in range(2):
        watched = sluice(sim_stack, "watch", job)
        assert watched.returncode == 1
        assert watched.stderr.startswith(
            f"sluice: {job} failed: The request is malformed: max_tokens: "
        )


def test_an_expired_job_ends_its_watch_with_the_reason(idle_stack: Stack) -> None:
    done = sluice(idle_stack, "submit", PROMPT, "--deadline-s", "0.5", "--watch")
    assert done.returncode == 1
    assert " expired: The job did not start before its deadline" in done.stderr
    (job,) = re.findall(r"job_\w+", done.stderr)
    shown = facts(sluice(idle_stack, "job", job).stdout.splitlines())
    assert shown["status"] == "expired"
    assert shown["ended"].endswith("never started")
    assert shown["error"].endswith("(job_expired)")


def test_a_job_shows_the_state_of_its_webhook(home: Path) -> None:
    terms = {"webhook_secrets": "whsec_c2VjcmV0", "webhook_allow_private": True}
    terms["webhook_ports"] = "1-65535"
    with socket.socket() as nobody, running(Stack(home, [SIM], keep_alive_s=1, **terms)) as stack:
        # Nobody listens there, and no other test gets the port.
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/gone"
        job = submit(stack, PROMPT, "--max-tokens", "2", "--webhook", url)

        def read_fact(fact: str) -> str:
            return facts(sluice(stack, "job", job).stdout.splitlines()).get(fact, "")

        # The second try is seen first where a read takes five seconds.
        await_that(lambda: re.fullmatch(r"pending after (1 try|[2-9] tries)", read_fact("webhook")))
        assert read_fact("status") == "completed"


@pytest.mark.parametrize("priority", ["interactive", "batch", "100", "-100"])
def test_a_priority_is_what_the_api_calls_it(sim_stack: Stack, priority: str) -> None:
    job = submit(sim_stack, PROMPT, "--max-tokens", "2", "--priority", priority)
    assert facts(sluice(sim_stack, "job", job).stdout.splitlines())["priority"] == priority


@pytest.mark.parametrize("priority", ["urgent", "101", "1.5", ""])
def test_a_priority_that_is_none_is_refused_with_those_that_are(
    sim_stack: Stack, priority: str
) -> None:
    done = sluice(sim_stack, "submit", PROMPT, "--priority", priority)
    assert (done.returncode, done.stdout) == (2, "")
    assert "neither interactive nor batch nor a number from -100 to 100" in done.stderr


def test_80_columns_are_enough(home: Path) -> None:
    models = [SIM | {"name": LONG_NAME, "args": {"tokens-per-s": 20}}]
    with running(Stack(home, models, keep_alive_s=1)) as stack:
        running_job = submit(stack, PROMPT, "--max-tokens", LONG)
        await_that(lambda: "in_progress" in sluice(stack, "job", running_job).stdout)
        assert sluice(stack, "pause", LONG_NAME).returncode == 0
        metadata = "note=" + "words that go on " * 20
        waiting = submit(stack, PROMPT, "--metadata", metadata)
        table, wide = (in_terminal(stack, "jobs", columns=columns) for columns in (80, 160))
        assert max(map(len, [*table, *in_terminal(stack, "job", waiting)])) <= 80
        assert table[0].split() == ["id", "status", "age", "model", "place"]
        assert [line.split()[:2] for line in table[1:]] == [
            [waiting, "queued"],
            [running_job, "in_progress"],
        ]
        assert table[1].rstrip().endswith("1, paused")
        assert "…" in table[1]
        assert wide[0].split()[-2:] == ["attempts", "tokens"]
        assert LONG_NAME in wide[1]
        piped = command(stack, "jobs")
        piped["env"] |= {"COLUMNS": "40"}
        text = subprocess.run(**piped, capture_output=True, text=True, check=True).stdout
        assert [_ageless(line) for line in text.splitlines()] == [_ageless(line) for line in wide]
        sluice(stack, "cancel", running_job, waiting)


def _ageless(line: str) -> list[str]:
    return [word for word in line.split() if not re.fullmatch(r"\d+[sm]", word)]


def test_ctrl_c_ends_a_watch_with_130_and_shows_how_to_go_on(idle_stack: Stack) -> None:
    watching = command(idle_stack, "submit", PROMPT, "--watch")
    with subprocess.Popen(**watching, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        await_that(lambda: _is_followed(idle_stack))
        watch.send_signal(signal.SIGINT)
        out, error = watch.communicate(timeout=20)
    (job,) = re.findall(r"sluice watch (job_\w+)", error.decode())
    assert (watch.returncode, out) == (130, b"")
    assert f"sluice cancel {job}" in error.decode()
    assert "queued" in sluice(idle_stack, "job", job).stdout


def _is_followed(stack: Stack) -> bool:
    found: dict[str, int] = requests.get(f"{stack.url}/health/live", timeout=5).json()
    return found["streams"] > 0


def test_the_version_is_an_option(sim_stack: Stack) -> None:
    done = sluice(sim_stack, "--version")
    assert (done.returncode, done.stdout) == (0, f"sluice {version('sluice')}\n")


@pytest.mark.parametrize("arguments", [["make"], ["make", "help"]])
def test_make_lists_its_targets(arguments: list[str]) -> None:
    root = Path(__file__).parent.parent
    output = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=True).stdout
    makefile = (root / "Makefile").read_text()
    targets = re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE)
    assert {"up", "test", "help"} <= set(targets)
    assert re.findall(r"^make ([a-z]+) ", output, re.MULTILINE) == targets
    assert {"SLUICE_MODEL", "REPEAT"} <= set(output.split())
    assert max(map(len, output.splitlines())) <= 80
