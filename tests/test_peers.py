"""`python -m bench peers`: the parts of it that need nothing from outside, with real servers."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import requests
import uvloop

from bench.drive import run_client
from bench.measurement import Load
from bench.peers import failure, queue_alone
from bench.peers.servers import ALONE, SLUICE, sim_server
from bench.reply import Reply
from bench.stack import Stack
from bench.stacks import StackError, launched
from tasks.contract.models import Model

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


def test_the_engine_as_a_server_answers_as_the_engine_does(sim_stack: Stack, home: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
    behind = requests.post(f"{sim_stack.url}/v1/chat/completions", json=body, timeout=30).json()
    with sim_server(Model(name="sim", engine="sim"), home) as engine:
        alone = requests.post(f"{engine.url}/v1/chat/completions", json=body, timeout=30).json()
        models = requests.get(f"{engine.url}/v1/models", timeout=30).json()
        unknown = requests.get(f"{engine.url}/unknown", timeout=30)
    assert alone["choices"] == behind["choices"]
    assert [model["id"] for model in models["data"]] == ["sim"]
    assert unknown.status_code == 404


def test_a_server_that_does_not_start_is_reported_with_its_log(home: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(StackError, match="no such model"),
        launched("broken", command, dict(os.environ), 9, "/health", home) as launch,
    ):
        launch.await_ready()


def test_whole_answers_come_at_the_rate_that_is_asked_for(home: Path) -> None:
    at_once = Model(name="sim", engine="sim", args={"tokens-per-s": 0, "first-token-s": 0})
    with sim_server(at_once, home) as engine:
        load = Load(engine.url, "sim", 4, 40, max_tokens=1, whole=True, per_s=40)
        seen = run_client(load)
    assert (seen.completed, seen.tokens, seen.errors) == (40, 40, {})
    assert seen.wall_s >= 39 / 40


def test_a_request_that_no_connection_is_free_for_waits_from_its_time_on(home: Path) -> None:
    slow = Model(name="sim", engine="sim", args={"first-token-s": 0.5})
    with sim_server(slow, home) as engine:
        seen = run_client(Load(engine.url, "sim", 1, 3, max_tokens=1, whole=True, per_s=1000))
    # The third was due at once, and begins when the second has ended.
    assert seen.end_to_end_ms.p99 >= 1500 - 10


def test_without_a_gateway_all_streams_of_a_killed_engine_break_off(home: Path) -> None:
    with failure.SETUPS[ALONE](home) as target:
        streams, later = uvloop.run(failure._under_fire(target))
    assert streams == Counter({"broken off": failure.STREAMS})
    # The kernel may take a moment to close what it listened on.
    assert later.keys() <= {"not connected", "closed without an answer"}
    assert later.total() == failure.STREAMS


def test_the_streams_of_a_killed_worker_come_whole(home: Path) -> None:
    with failure.SETUPS[SLUICE](home) as target:
        streams, later = uvloop.run(failure._under_fire(target))
    assert set(streams) <= set(failure.WHOLE)
    assert streams["resumed"] >= failure.STREAMS // 2
    assert set(later) <= set(failure.WHOLE)


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ([b"a", b"b"], "undisturbed"),
        ([b"a"], "cut short, as if whole"),
        ([b"a", b"b", b"b"], "tokens doubled"),
    ],
)
def test_a_stream_that_ends_is_judged_by_its_tokens(events: list[bytes], outcome: str) -> None:
    reply = Reply(0)
    reply.feed(HEAD, 0)
    for text in events:
        reply.feed(b'data: {"choices":[{"delta":{"content":"' + text + b'"}}]}\n\n', 0)
    reply.feed(b"data: [DONE]\n\n", 0)
    assert failure._outcome(reply, 2) == outcome


def test_an_error_in_mid_stream_is_no_token() -> None:
    reply = Reply(0)
    reply.feed(HEAD + b'data: {"error": {"message": "gone"}}\n\ndata: [DONE]\n\n', 0)
    assert failure._outcome(reply, 2) == "error in mid-stream"


def test_the_usage_of_a_gateway_counts_though_it_has_a_choice() -> None:
    reply = Reply(0)
    usage = b'{"choices":[{"index":0,"delta":{"content":""}}],"usage":{"completion_tokens":7}}'
    reply.feed(HEAD + b"data: " + usage + b"\n\ndata: [DONE]\n\n", 0)
    assert (reply.tokens, reply.text_at_s) == (7, [])


def test_a_header_that_a_gateway_repeats_under_a_longer_name_is_not_the_answers_own() -> None:
    reply = Reply(0)
    repeated = b"llm_provider-transfer-encoding: chunked\r\nllm_provider-content-length: 9\r\n"
    reply.feed(b"HTTP/1.1 200 OK\r\n" + repeated + b"content-length: 2\r\n\r\n{}", 0)
    assert (reply.is_complete, reply.text) == (True, b"{}")


def test_jobs_go_through_the_queue_without_an_api(home: Path) -> None:
    stack = Stack(home, [queue_alone.MODEL], bus_url="", database_url="", model="")
    try:
        stack.start_redis()
        backlog = queue_alone.Backlog(stack.redis, queue_alone.Settings())
        assert queue_alone._by_itself(backlog, 10) > 0
        stack.start_worker("sim")
        stack.await_workers(1)
        assert queue_alone._through_worker(stack, backlog, 10) > 0
    finally:
        stack.stop()
        stack.redis.close()


def test_an_unknown_part_is_refused_with_the_parts_that_there_are() -> None:
    command = [sys.executable, "-m", "bench", "peers", "everything"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "'relay'" in done.stderr
