"""Jobs whose webhooks have names that nobody answers for do not hold up the API."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from bench.stack import Stack, await_that, running, slack
from tests.conftest import SIM
from tests.test_webhooks import OLD

# Python runs it before anything else, gevent's patches included.
NAME_SERVERS = """
import _socket, time

ask, wait = _socket.getaddrinfo, time.sleep

def getaddrinfo(host, *args, **options):
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name.endswith(".silent.test"):
        wait(60)
    if name.endswith(".test"):
        if name != "inside.test":
            raise _socket.gaierror(_socket.EAI_AGAIN, "Temporary failure in name resolution")
        host = "10.0.0.1"
    return ask(host, *args, **options)

_socket.getaddrinfo = getaddrinfo
"""
SILENT = 40
# The API waits for the address of a name for five seconds.
LESS_THAN_A_NAME_S = 4.5


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Its names are as above, and no job begins."""
    home: Path = tmp_path_factory.mktemp("names")
    (home / "sitecustomize.py").write_text(NAME_SERVERS)
    stack = Stack(home, [SIM], webhook_secrets=OLD)
    stack.env["PYTHONPATH"] = f"{home}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with running(stack, workers=0):
        yield stack


def submit(stack: Stack, webhook: str | None) -> tuple[requests.Response, float]:
    """What the API answers to a job, and after how many seconds."""
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    job = {"endpoint": "/v1/chat/completions", "body": body, "webhook": webhook}
    began_s = time.monotonic()
    answer = requests.post(f"{stack.url}/v1/jobs", json=job, timeout=50)
    return answer, time.monotonic() - began_s


def connections(stack: Stack) -> int:
    """Of clients, that the API has accepted."""
    (process,) = psutil.Process(stack.api_processes[0].pid).children()
    opened = process.net_connections("tcp")
    return sum(c.status == "ESTABLISHED" and c.laddr.port == stack.api_ports[0] for c in opened)


def test_a_private_name_is_refused_and_an_unknown_one_waits_for_its_call(stack: Stack) -> None:
    refused, _ = submit(stack, "http://inside.test/hook")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "webhook")
    assert "not public" in refused.text
    accepted, _ = submit(stack, "http://unknown.test/hook")
    assert accepted.status_code == 202


def test_the_command_does_not_wait_for_a_silent_name(stack: Stack) -> None:
    command = [sys.executable, "-m", "deploy.cli", "webhooks", "test", "http://a.silent.test/"]
    run = subprocess.run(
        command, env=stack.env, capture_output=True, text=True, timeout=50, check=False
    )
    assert (run.returncode, run.stderr) == (1, "")
    assert "no address of the host within 5 s" in run.stdout


def test_the_command_refuses_a_private_name(stack: Stack) -> None:
    command = [sys.executable, "-m", "deploy.cli", "webhooks", "test", "http://inside.test/"]
    run = subprocess.run(
        command, env=stack.env, capture_output=True, text=True, timeout=50, check=False
    )
    assert run.returncode == 2
    assert "the URL's host is not public" in run.stderr


def test_silent_names_hold_up_neither_their_jobs_nor_others(stack: Stack) -> None:
    silent = [f"http://{number}.silent.test/hook" for number in range(SILENT)]
    with ThreadPoolExecutor(SILENT) as pool:
        submitted = [pool.submit(submit, stack, url) for url in silent]
        await_that(lambda: connections(stack) >= SILENT)
        for webhook in (None, "http://8.8.8.8/hook", "http://[2606:4700::1111]/hook"):
            answer, took_s = submit(stack, webhook)
            assert answer.status_code == 202
            assert took_s < slack(LESS_THAN_A_NAME_S)
        began_s = time.monotonic()
        assert requests.get(f"{stack.url}/health/ready", timeout=50).status_code == 503
        assert requests.get(f"{stack.url}/health/live", timeout=50).ok
        assert time.monotonic() - began_s < slack(LESS_THAN_A_NAME_S)
        answers = [one.result() for one in submitted]
    assert {answer.status_code for answer, _ in answers} == {202}
    assert max(took_s for _, took_s in answers) < slack(10)
