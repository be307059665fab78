"""`sluice submit`, `watch`, `jobs` and `cancel`: the real program against a real deployment."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests

from bench.stack import Stack, await_that, running
from db import writing
from db.models import JobRecord
from deploy.redis_server import free_port
from tests.conftest import SIM

PROMPT = "Tell me of the river"
COLUMNS = ["id", "status", "age", "model", "place", "attempts", "tokens"]
LONG = "20000"  # tokens: more than any test waits for


def command(stack: Stack, *arguments: str) -> dict[str, Any]:
    """What subprocess needs to run the program against the stack."""
    return {
        "args": [sys.executable, "-m", "deploy.cli", *arguments],
        "env": stack.env | {"SLUICE_API_URL": stack.url},
    }


def sluice(stack: Stack, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    start = command(stack, *arguments)
    return subprocess.run(
        **start, input=stdin, capture_output=True, text=True, timeout=240, check=False
    )


def submit(stack: Stack, *arguments: str, stdin: str = "") -> str:
    """Queues a job and returns its id."""
    done = sluice(stack, "submit", *arguments, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def text(stack: Stack, max_tokens: int) -> str:
    """The sim engine's answer to PROMPT, without a job."""
    messages = [{"role": "user", "content": PROMPT}]
    body = {"messages": messages, "max_tokens": max_tokens}
    answer = requests.post(f"{stack.url}/v1/chat/completions", json=body, timeout=240)
    return str(answer.json()["choices"][0]["message"]["content"])


def read_until(file: int, is_enough: Callable[[bytes], bool]) -> bytes:
    """What comes from the open file until it is enough."""
    seen = b""
    while not is_enough(seen):
        piece = os.read(file, 4096)
        assert piece, f"ended after {seen!r}"
        seen += piece
    return seen


@pytest.fixture
def slow_stack(home: Path) -> Iterator[Stack]:
    """A deployment of the test's own, at 20 tokens per second."""
    args = {"tokens-per-s": 20, "first-token-s": 0.05}
    with running(Stack(home, [SIM | {"args": args}], keep_alive_s=1)) as stack:
        yield stack


def test_a_watched_job_prints_its_text_once(sim_stack: Stack) -> None:
    done = sluice(sim_stack, "submit", PROMPT, "--max-tokens", "30", "--watch")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == text(sim_stack, 30) + "\n"


def test_submit_prints_the_id_alone_and_watch_shows_the_job_as_often_as_asked(
    sim_stack: Stack,
) -> None:
    job = submit(sim_stack, PROMPT, "--max-tokens", "5")
    assert requests.get(f"{sim_stack.url}/v1/jobs/{job}", timeout=10).json()["id"] == job
    for _ in range(2):
        done = sluice(sim_stack, "watch", job)
        assert (done.returncode, done.stdout) == (0, text(sim_stack, 5) + "\n")


def test_a_prompt_comes_from_standard_input(sim_stack: Stack) -> None:
    done = sluice(sim_stack, "submit", "-", "--max-tokens", "7", "--watch", stdin=PROMPT)
    assert done.stdout == text(sim_stack, 7) + "\n"


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", [{}, ASCII])
@pytest.mark.parametrize("is_argument", [False, True])
def test_a_prompt_is_utf_8_in_every_locale(
    idle_stack: Stack, locale: dict[str, str], is_argument: bool
) -> None:
    prompt = "Où coule la rivière? 河".encode()
    start = command(idle_stack, "submit")
    start["args"] += [prompt if is_argument else "-"]
    start["env"] |= locale
    done = subprocess.run(**start, input=prompt, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    with writing(idle_stack.database_url) as session:
        job = session.get(JobRecord, done.stdout.decode().strip())
        assert job is not None
        assert orjson.loads(job.request or b"")["messages"][0]["content"] == prompt.decode()


@pytest.mark.parametrize("locale", [{}, ASCII])
@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["-"], b"\x89PNG\r\n\xff\0", "standard input is not text in UTF-8"),
        ([b"\xff"], b"", "PROMPT is not text in UTF-8"),
        (["x", "--metadata", b"a=\xff"], b"", "an option is not text in UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(
    sim_stack: Stack, locale: dict[str, str], arguments: list[Any], stdin: bytes, says: str
) -> None:
    start = command(sim_stack, "submit", *arguments)
    start["env"] |= locale
    done = subprocess.run(**start, input=stdin, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines()[-1] == f"Error: {says}"
    assert done.stderr.startswith(b"Usage: ")


def test_a_standard_input_that_is_closed_is_refused(sim_stack: Stack) -> None:
    start = command(sim_stack, "submit", "-")
    start["args"] = ["sh", "-c", 'exec "$0" "$@" <&-', *start["args"]]
    done = subprocess.run(**start, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "Error: standard input is closed"


@pytest.mark.parametrize("deadline", ["nan", "inf", "-inf", "0", "-1"])
def test_a_deadline_that_never_comes_or_is_over_is_refused(sim_stack: Stack, deadline: str) -> None:
    done = sluice(sim_stack, "submit", "x", f"--deadline-s={deadline}")
    assert (done.returncode, done.stdout) == (2, "")
    says = "Error: Invalid value for '--deadline-s': "
    assert done.stderr.splitlines()[-1].startswith(says)


def test_a_body_goes_to_its_endpoint_with_the_terms_given(sim_stack: Stack) -> None:
    terms = ["--priority", "3", "--deadline-s", "60", "--metadata", "team=a=b"]
    body = '{"prompt": "The river", "max_tokens": 4}'
    endpoint = "/v1/completions"
    done = sluice(
        sim_stack, "submit", "--body", "-", "--endpoint", endpoint, *terms, "--watch", stdin=body
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) == 4
    (line,) = sluice(sim_stack, "jobs", "--limit", "1", "--json").stdout.splitlines()
    job = orjson.loads(line)
    assert (job["endpoint"], job["metadata"]) == (endpoint, {"team": "a=b"})


@pytest.mark.parametrize("body", ["{", "[]"])
def test_a_body_that_is_no_json_object_is_refused_here(sim_stack: Stack, body: str) -> None:
    done = sluice(sim_stack, "submit", "--body", "-", stdin=body)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--body" in done.stderr


def test_jobs_are_listed_as_a_table_and_as_json(sim_stack: Stack) -> None:
    job = submit(sim_stack, PROMPT, "--max-tokens", "6")
    assert sluice(sim_stack, "watch", job).returncode == 0
    table = sluice(sim_stack, "jobs", "--model", "sim").stdout
    assert table.split()[:7] == COLUMNS
    (row,) = [row.split() for row in table.splitlines() if job in row]
    assert (row[:2], row[3]) == ([job, "completed"], "sim")
    lines = sluice(sim_stack, "jobs", "--limit", "2", "--json").stdout.splitlines()
    listed = [orjson.loads(line) for line in lines]
    assert len(listed) <= 2
    assert listed[0]["id"] == job
    assert job not in sluice(sim_stack, "jobs", "--status", "queued").stdout


def test_a_cancelled_job_ends_its_watch_with_an_error(sim_stack: Stack) -> None:
    jobs = [submit(sim_stack, PROMPT, "--max-tokens", LONG) for _ in range(2)]
    watching = command(sim_stack, "watch", jobs[0])
    with subprocess.Popen(**watching, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        read_until(watch.stdout.fileno(), lambda seen: len(seen) > 20)
        done = sluice(sim_stack, "cancel", *jobs)
        assert (done.returncode, done.stderr) == (0, "")
        assert [line.split()[0] for line in done.stdout.splitlines()] == jobs
        _, error = watch.communicate(timeout=120)
    assert watch.returncode == 1
    assert error.startswith(f"sluice: {jobs[0]} cancelled: ".encode())
    listed = ("jobs", "--status", "cancelled")
    await_that(lambda: sluice(sim_stack, *listed).stdout.count("job_") >= 2)


def test_cancel_goes_on_after_a_job_that_it_cannot_cancel(sim_stack: Stack) -> None:
    job = submit(sim_stack, PROMPT, "--max-tokens", LONG)
    done = sluice(sim_stack, "cancel", "job_unknown", job)
    assert done.returncode == 2
    assert done.stdout.split()[0] == job
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["watch", "job", "cancel"])
def test_an_unknown_job_gets_the_message_of_the_api(sim_stack: Stack, name: str) -> None:
    answer = requests.get(f"{sim_stack.url}/v1/jobs/job_unknown", timeout=10)
    done = sluice(sim_stack, name, "job_unknown")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"sluice: {answer.json()['error']['message']}\n"


def test_a_failed_job_gives_exit_code_1_and_its_error(sim_stack: Stack) -> None:
    body = '{"message": "Hello", "stream": true, "sim": {"failure": "error"}}'
    done = sluice(sim_stack, "submit", "--body", "-", "--watch", stdin=body)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sluice: job_")
    assert line.endswith(" failed: Internal server error")


@pytest.mark.parametrize("arguments", ["submit x", "watch x", "job x", "jobs", "cancel x"])
def test_a_server_that_is_not_there_is_one_sentence(sim_stack: Stack, arguments: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = sluice(sim_stack, *arguments.split(), "--url", url)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"no API answers at {url}" in line
    assert "make up" in line
    assert "--url" in line


def test_a_watch_outlives_its_api_without_losing_or_doubling_a_token(slow_stack: Stack) -> None:
    expected = text(slow_stack, 80)
    watching = command(slow_stack, "submit", PROMPT, "--max-tokens", "80", "--watch")
    with subprocess.Popen(**watching, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        begun = read_until(watch.stdout.fileno(), lambda seen: len(seen) > 60)
        # With its gunicorn workers: they hold the port.
        os.killpg(slow_stack.api_processes[0].pid, signal.SIGKILL)
        slow_stack.api_processes[0].popen.wait()
        slow_stack.start_api(slow_stack.api_ports[0])
        rest, error = watch.communicate(timeout=240)
    assert (watch.returncode, error) == (0, b"")
    assert (begun + rest).decode() == expected + "\n"


def test_a_terminal_shows_the_place_and_ctrl_c_leaves_the_job(idle_stack: Stack) -> None:
    submit(idle_stack, PROMPT)
    job = submit(idle_stack, PROMPT)
    terminal, its_end = pty.openpty()
    watching = command(idle_stack, "watch", job)
    watching["env"] |= {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(**watching, stdout=subprocess.PIPE, stderr=its_end) as watch:
        read_until(terminal, lambda seen: b"place 2 in the queue" in seen)
        watch.send_signal(signal.SIGINT)
        shown = read_until(terminal, lambda seen: b"ends it" in seen).decode()
        assert watch.wait(120) == 130
    os.close(terminal)
    os.close(its_end)
    assert f"sluice watch {job}" in shown
    assert job in sluice(idle_stack, "jobs", "--status", "queued").stdout
