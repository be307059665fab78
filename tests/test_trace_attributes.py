"""What the span of an attempt tells of the request and of its answer."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import pytest

from bench.otlp import Receiver
from bench.stack import serving
from gpu_worker.trace_attributes import MOST_READ_BYTES, Answer
from tests.faults.clients import Client, chat
from tests.test_tracing import API, CLIENT, await_spans, named, tracing


@pytest.fixture
def collector() -> Iterator[Receiver]:
    with serving(Receiver()) as receiver:
        yield receiver


class Far(BaseHTTPRequestHandler):
    """A server that has made two answers, and tells more of its usage than sim does."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "far-1"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        message = {"role": "assistant", "content": "Hello"}
        reasons = {1: "length", 0: "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
        usage |= {"prompt_tokens_details": {"cached_tokens": 4}}
        usage |= {"completion_tokens_details": {"reasoning_tokens": 3}}
        choices = [
            {"index": index, "message": message, "finish_reason": reason}
            for index, reason in reasons.items()
        ]
        self._answer({"id": "chatcmpl-1", "model": "far-1b", "choices": choices, "usage": usage})

    def _answer(self, document: object) -> None:
        body = orjson.dumps(document)
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def test_the_answer_of_a_remote_server_is_described(home: Path, collector: Receiver) -> None:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Far)) as far:
        url = f"http://127.0.0.1:{far.server_port}"
        model = {"name": "far", "engine": "remote", "source": url}
        with tracing(home, collector.url, model) as stack:
            assert Client(stack, chat(n=2), **CLIENT).answer()
            attempt = named(await_spans(collector, API, "chat far"), "chat far")
    wanted = {
        "gen_ai.request.model": "far",
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "far-1b",
        "gen_ai.response.finish_reasons": ["stop", "length"],
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.reasoning.output_tokens": 3,
        "server.address": "127.0.0.1",
        "server.port": far.server_port,
    }
    assert attempt.attributes | wanted == attempt.attributes


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"no JSON",
        b"[]",
        b'{"id": 1, "model": null, "choices": 2}',
        b'{"choices": [3, {"index": [0], "finish_reason": "stop"}]}',
        b'{"id": "' + b"x" * MOST_READ_BYTES + b'"}',
    ],
)
def test_an_answer_of_another_shape_describes_nothing(answer: bytes) -> None:
    described = Answer()
    described.note(answer)
    assert described.attributes == {}
