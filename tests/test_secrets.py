"""The password in SLUICE_API_URL and the key beside it: used, and never shown or written down."""

import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner, Result

from bench.stack import Stack, serving
from deploy.cli import main
from deploy.redis_server import free_port
from tasks.contract.settings import get_settings
from tests.test_client import command

MARK = "7f3a"
PASSWORD = f"{MARK}-web"
NOWHERE = "http://127.0.0.1:1"
COMMANDS = [["submit", "x"], ["watch", "x"], ["job", "x"], ["jobs"], ["cancel", "x"], ["bench"]]


def sluice(*arguments: str, **env: str) -> Result:
    """Runs the program here; nothing that it prints may hold what is marked."""
    get_settings.cache_clear()
    try:
        done = CliRunner().invoke(main, arguments, env=env)
    finally:
        get_settings.cache_clear()
    assert MARK not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def of_stack(stack: Stack, *arguments: str, **env: str) -> str:
    """What a program of its own prints when the stack gives it what it wants."""
    start = command(stack, *arguments)
    start["env"] |= env
    done = subprocess.run(**start, capture_output=True, text=True, timeout=60, check=False)
    assert MARK not in done.stdout + done.stderr
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def sentence(done: Result) -> str:
    """The one with which the program has ended."""
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sluice: ")
    return line


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("is_option", [False, True])
def test_a_password_is_not_shown_when_nobody_answers(arguments: list[str], is_option: bool) -> None:
    port = free_port()
    url = f"http://me:{PASSWORD}@127.0.0.1:{port}"
    given = (
        sluice(*arguments, "--url", url) if is_option else sluice(*arguments, SLUICE_API_URL=url)
    )
    assert f"no API answers at http://me:…@127.0.0.1:{port} (" in sentence(given)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"http://me:{MARK}/x@127.0.0.1", "http://me:…@127.0.0.1 is not a URL"),
        (f"http://me:{MARK}x@127.0.0.1:port", "http://me:…@127.0.0.1:port is not a URL"),
        (f"http://me:{MARK}\tx@127.0.0.1", "http://me:…@127.0.0.1 is not a URL"),
        (f"me:{MARK}@127.0.0.1", "no API answers at …@127.0.0.1 ("),
        (f"file://me:{MARK}@127.0.0.1/", "no API answers at file://me:…@127.0.0.1/ ("),
        (f"http://me:{MARK}[@127.0.0.1:1", "no API answers at http://me:…@127.0.0.1:1 ("),
        ("http://127.0.0.1:1/\udcff", "is not a URL: 'utf-8' codec"),
        ("http://127.0.0.1:port", "is not a URL: Invalid port: 'port'"),
    ],
)
def test_a_password_is_not_shown_of_what_is_no_url(url: str, says: str) -> None:
    for name in ("jobs", "bench"):
        assert says in sentence(sluice(name, SLUICE_API_URL=url))


def test_a_password_is_not_shown_when_tls_is_refused() -> None:
    url = f"https://me:{PASSWORD}@127.0.0.1:{free_port()}"
    assert "http only, not https://me:…@127.0.0.1" in sentence(sluice("bench", SLUICE_API_URL=url))


class Stranger(BaseHTTPRequestHandler):
    """Lists no models, has nothing in its streams, and does not know what it is asked else."""

    def do_GET(self) -> None:
        kind, body = "text/html", b"Who?"
        if self.path == "/v1/models":
            kind, body = "application/json", b"{}"
        elif self.path.endswith("/events"):
            kind, body = "text/event-stream", b""
        self.send_response(404 if body == b"Who?" else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    with serving(HTTPServer(("127.0.0.1", 0), Stranger)) as server:
        yield f"127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["jobs"], "answered 404: 'Who?'"),
        (["bench"], "lists no model; name one with --model"),
        (["watch", "x"], "ended the stream of x too early"),
    ],
)
def test_a_password_is_not_shown_of_another_server(
    stranger: str, arguments: list[str], says: str
) -> None:
    url = f"http://me:{PASSWORD}@{stranger}"
    done = sluice(*arguments, SLUICE_API_URL=url)
    assert sentence(done) == f"sluice: http://me:…@{stranger} {says}"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_is_shown_and_saved_without_the_password(
    sim_stack: Stack, tmp_path: Path, as_json: bool
) -> None:
    saved = tmp_path / "run.json"
    url = sim_stack.url.replace("://", f"://me:{PASSWORD}@")
    load = ["--streams=1", "--requests=2", "--rounds=1", "--max-tokens=3", f"--save={saved}"]
    shown = of_stack(sim_stack, "bench", *load, *["--json"] * as_json, SLUICE_API_URL=url)
    assert sim_stack.url in shown
    assert MARK not in saved.read_text()
    assert orjson.loads(saved.read_bytes())["url"] == sim_stack.url


@pytest.mark.parametrize("bad", ["\a", "\x7f", "a\nb", "é", "\u2028", "\udcff"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(bad: str) -> None:
    for arguments in COMMANDS:
        done = sluice(*arguments, SLUICE_API_URL=NOWHERE, SLUICE_API_KEY=f"{MARK}{bad}key")
        assert "SLUICE_API_KEY=…: " in sentence(done)


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_what_surrounds_a_key_does_not_count(sim_stack: Stack, end: str) -> None:
    of_stack(sim_stack, "jobs", "--json", SLUICE_API_KEY=f"{MARK}-key{end}")
