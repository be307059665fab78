"""A stream's chunks put together as the answer of a request that was not streamed."""

import time
from typing import Any

import orjson
import pytest

from tasks.contract.errors import DecodeError
from tasks.contract.events import End, Entry, Kind, Position, Start
from tasks.contract.job import State
from tasks.contract.response import assemble, fold, read

HEADERS = [("content-type", "text/event-stream; charset=utf-8")]


def chunk(delta: dict[str, Any], index: int = 0, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": None, **more}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}


def log_of(chunks: list[dict[str, Any]]) -> list[Entry]:
    """The log of a job that has answered with these."""
    start = Start(200, HEADERS, 0, 1).encode()
    bodies = [b"data: " + orjson.dumps(document) + b"\n\n" for document in chunks]
    entries = [(Kind.START, start), *((Kind.BODY, body) for body in bodies)]
    entries += [(Kind.BODY, b"data: [DONE]\n\n"), (Kind.END, End(State.COMPLETED).encode())]
    return [Entry("job_1", Position(1, seq), *entry) for seq, entry in enumerate(entries)]


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": None, "usage": {"total_tokens": 9}},
        {"choices": [None]},
        {"choices": [{"index": "a", "delta": {}}, {"index": 1, "delta": {}}]},
        {"choices": 7},
    ],
)
def test_chunks_of_any_shape_can_be_recorded(odd: dict[str, Any]) -> None:
    """One server's `choices: null` held up the records of all jobs."""
    told = assemble(log_of([chunk({"content": "Hi"}), odd]))
    assert told
    assert told.state is State.COMPLETED
    assert b"Hi" in (told.body or b"")


def test_a_log_that_another_attempt_took_over_has_no_end() -> None:
    ended = log_of([chunk({"content": "Hi"})])
    takeover = Entry("job_1", Position(2, 0), Kind.TAKEOVER, b"1-3")
    assert assemble(ended)
    assert assemble([*ended, takeover]) is None
    assert assemble([]) is None


def test_only_the_first_head_and_the_last_end_have_to_be_readable() -> None:
    head, *rest = log_of([chunk({"content": "Hi"})])
    inner = [Entry("job_1", Position(1, 9), kind, b"?") for kind in (Kind.END, Kind.START)]
    told = assemble([head, *inner, *rest])
    assert told
    assert b"Hi" in (told.body or b"")


@pytest.mark.parametrize("kind", [Kind.START, Kind.END])
@pytest.mark.parametrize("data", [b"", b"{", b"7", b"[]", b"{}", b"[[],[],[],[],[]]", b'["on",7]'])
def test_heads_and_ends_of_another_shape_are_one_kind_of_error(kind: Kind, data: bytes) -> None:
    entry = Entry("job_1", Position(1, 0), kind, data)
    with pytest.raises(DecodeError):
        list(read([entry]))


def test_texts_tools_and_choices_are_put_together_from_their_pieces() -> None:
    def call(index: int, arguments: str, **named: str) -> dict[str, Any]:
        function = {"arguments": arguments, **named}
        return {"index": index, "type": "function", "function": function}

    chunks = [
        chunk({"role": "assistant", "content": None}),
        chunk({"role": "assistant", "content": ""}, 1),
        chunk({"reasoning": "Hm"}),
        chunk({"reasoning": "."}),
        chunk({"tool_calls": [call(0, "", name="look") | {"id": "call_1"}]}),
        chunk({"content": "Hel"}, 1, logprobs={"content": [{"token": "Hel", "logprob": -1.0}]}),
        chunk({"tool_calls": [call(0, '{"a":')]}),
        chunk({"tool_calls": [call(1, "{", name="see") | {"id": "call_2"}]}),
        chunk({"tool_calls": [call(0, " 1}"), call(1, "}")]}),
        chunk({"content": "lo"}, 1, logprobs={"content": [{"token": "lo", "logprob": -2.0}]}),
        chunk({}, finish_reason="tool_calls"),
        chunk({}, 1, finish_reason="stop"),
        {"id": "chatcmpl-1", "choices": [], "usage": {"total_tokens": 9}},
    ]
    whole = fold(chunks)
    assert whole == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "usage": {"total_tokens": 9},
        "choices": [
            {
                "index": 0,
                "finish_reason": "tool_calls",
                "message": {
                    "role": "assistant",
                    "content": None,
                    "reasoning": "Hm.",
                    "tool_calls": [
                        call(0, '{"a": 1}', name="look") | {"id": "call_1"},
                        call(1, "{}", name="see") | {"id": "call_2"},
                    ],
                },
            },
            {
                "index": 1,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "Hello"},
                "logprobs": {
                    "content": [
                        {"token": "Hel", "logprob": -1.0},
                        {"token": "lo", "logprob": -2.0},
                    ]
                },
            },
        ],
    }


@pytest.mark.parametrize("with_logprobs", [False, True])
def test_a_long_answer_takes_time_in_proportion(with_logprobs: bool) -> None:
    def took_s(tokens: int) -> float:
        more = {"logprobs": {"content": [{"token": "word ", "logprob": -1}]}}
        piece = chunk({"content": "word " * 20}, **(more if with_logprobs else {}))
        entries = log_of([piece] * tokens)
        begun_s = time.process_time()
        outcome = assemble(entries)
        took_s = time.process_time() - begun_s
        assert outcome is not None
        assert len(outcome.body or b"") > 100 * tokens
        return took_s

    # Five times as much in five times the time; what copied all that it had would take 25.
    assert took_s(100_000) < 10 * took_s(20_000)
