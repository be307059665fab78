"""A server at the URL in SLUICE_MODEL, which knows its own name for its model only.

It frames its events in ways of its own, and all clients here get them in the same.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
import requests

from bench.stack import Stack, running, serving

DELTAS: list[dict[str, Any]] = [{"role": "assistant", "content": "Hello"}, {"content": " there"}]
CHUNKS = [
    {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "far-1",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }
    for delta in DELTAS
]
DATA = [*map(json.dumps, CHUNKS), "[DONE]"]
PRETTY = json.dumps(CHUNKS[0], indent=1).split("\n")
# What the server sends, in one piece.
FRAMED = {
    "LF": "".join(f"data: {data}\n\n" for data in DATA),
    "CRLF": "".join(f"data: {data}\r\n\r\n" for data in DATA),
    "CR": "".join(f"data: {data}\r\r" for data in DATA),
    "no space": "".join(f"data:{data}\n\n" for data in DATA),
    "comments": ": PROCESSING\n\n" + "".join(f": PROCESSING\ndata: {data}\n\n" for data in DATA),
    "CRLF, comments": "".join(f": PROCESSING\r\n\r\ndata: {data}\r\n\r\n" for data in DATA),
    "fields": "".join(f"event: x\nid: 7\nretry: 1\ndata: {data}\n\n" for data in DATA),
    "lines": "".join(f"data: {line}\n" for line in PRETTY)
    + "".join(f"\ndata: {data}\n" for data in DATA[1:])
    + "\n",
    "empty": "data: \n\n" + "".join(f"data: {data}\n\n\n\n" for data in DATA),
    "no end": "\n\n".join(f"data: {data}" for data in DATA),
}
REFUSAL = {"error": {"message": "No.", "type": "refused", "param": None, "code": "no"}}
REFUSED = json.dumps(REFUSAL, indent=2)


class Far(BaseHTTPRequestHandler):
    """Answers in the way that the question names."""

    client_has_begun = threading.Event()
    """Set when the client of a late refusal has the beginning of a stream."""

    def do_GET(self) -> None:
        self._answer(200, "application/json", json.dumps({"data": [{"id": "far-1"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        way = body["messages"][0]["content"]
        if body.get("model") != "far-1":
            self._answer(404, "application/json", '{"error": "no such model"}')
        elif way == "refused late":
            self.client_has_begun.wait(60)
            self._answer(400, "application/json", REFUSED)
        elif way == "refused as a stream":
            self._answer(400, "text/event-stream", REFUSED)
        else:
            self._answer(200, "text/event-stream", FRAMED[way])

    def _answer(self, status: int, content_type: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        return


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Far)) as far:
        url = f"http://127.0.0.1:{far.server_port}"
        demo = {"name": "demo", "aliases": ["gpt-3.5-turbo"], "engine": "sim"}
        home = tmp_path_factory.mktemp("far")
        with running(Stack(home, [demo], model=url, keep_alive_s=5)) as stack:
            yield stack


def asking(way: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": way}], "stream": True}


def events(text: str) -> list[dict[str, list[str]]]:
    """The fields of each event, by the rule of SSE."""
    found = []
    for block in filter(None, text.split("\n\n")):
        fields: dict[str, list[str]] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
        found.append(fields)
    return [fields for fields in found if "" not in fields]  # comments have no name


@pytest.mark.parametrize("way", FRAMED)
def test_a_jobs_events_and_its_stored_answer_are_whole(stack: Stack, way: str) -> None:
    job = {"endpoint": "/v1/chat/completions", "body": asking(way)}
    url = f"{stack.url}/v1/jobs/" + requests.post(f"{stack.url}/v1/jobs", json=job).json()["id"]
    told = events(requests.get(f"{url}/events", timeout=30).text)
    own = [fields for fields in told if fields.get("event") != ["queue"]]
    data = ["\n".join(fields["data"]) for fields in own]
    assert data[-1] == "[DONE]"
    assert list(map(json.loads, data[:-1])) == CHUNKS
    # Each can be resumed after.
    assert len({fields["id"][0] for fields in own if "id" in fields}) == len(own)
    ended = requests.get(url, headers={"Prefer": "wait=60"}, timeout=90).json()
    assert ended["status"] == "completed"
    (choice,) = ended["response"]["body"]["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there"}


@pytest.mark.parametrize("way", FRAMED)
def test_a_streamed_chat_is_whole(stack: Stack, way: str) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(
            client.chat.completions.create(
                model="gpt-3.5-turbo", messages=[{"role": "user", "content": way}], stream=True
            )
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello there"


@pytest.mark.parametrize("way", ["refused late", "refused as a stream"])
def test_a_refusal_in_many_lines_is_one_event(stack: Stack, way: str) -> None:
    url = f"{stack.url}/v1/chat/completions"
    with requests.post(url, json=asking(way), stream=True, timeout=90) as answer:
        Far.client_has_begun.set()
        text = answer.text
    first, *others = (fields["data"] for fields in events(text))
    assert others == ([["[DONE]"]] if way == "refused late" else [])
    assert list(map(json.loads, first)) == [REFUSAL]


@pytest.mark.parametrize("named", [{}, {"model": "remote"}, {"model": "demo"}])
def test_the_server_is_asked_for_the_model_that_it_lists(
    stack: Stack, named: dict[str, str]
) -> None:
    answer = requests.post(
        f"{stack.url}/v1/chat/completions", json=asking("LF") | named, timeout=30
    )
    assert answer.text == FRAMED["LF"]
