"""A streamed chat completion, read and timed while it arrives."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

DONE = b"[DONE]"


class WrongAnswerError(Exception):
    """It is no whole answer; what is wrong in the same way has the same message, to be counted."""


@dataclass(frozen=True)
class Answer:
    """What came; its times are seconds from sending the request."""

    text: str
    tokens: int  # by the server's own count: an event may carry several
    size_bytes: int
    ttft_s: float
    last_text_s: float
    end_s: float

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first one; None where there is no other."""
        if self.tokens < 2:
            return None
        return (self.last_text_s - self.ttft_s) / (self.tokens - 1)


def read_answer(
    pieces: Iterable[bytes], asked_at_s: float, on_text: Callable[[float], object]
) -> Answer:
    """Reads to the end; `asked_at_s` is of `time.perf_counter`.

    `on_text` gets the seconds from then to each event with text, as soon as that is there.

    Raises:
        WrongAnswerError: it has an error, no text, or no end.
    """
    texts: list[str] = []
    text_at_s: list[float] = []
    tokens = size_bytes = 0
    data = b""
    for data in _read_events(pieces):
        now_s = time.perf_counter() - asked_at_s
        size_bytes += len(data)
        if data == DONE:
            continue  # what is left of the body frees the connection for the next request
        chunk = _parse(data)
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if text := _text(chunk):
            texts.append(text)
            text_at_s.append(now_s)
            on_text(now_s)
    if data != DONE:
        raise WrongAnswerError("a stream without [DONE]")
    if not texts:
        raise WrongAnswerError("a stream without text")
    end_s = time.perf_counter() - asked_at_s
    return Answer("".join(texts), tokens, size_bytes, text_at_s[0], text_at_s[-1], end_s)


def _read_events(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event, once it is whole; a keep-alive has none."""
    rest = b""
    for piece in pieces:
        *events, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.splitlines():
                if line.startswith(b"data:"):
                    yield line.removeprefix(b"data:").strip()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        chunk: dict[str, Any] = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise WrongAnswerError("an event that is no JSON") from None
    if error := chunk.get("error"):
        raise WrongAnswerError(f"a stream that ended with the error {error.get('code')}")
    return chunk


def _text(chunk: dict[str, Any]) -> str:
    """The chunk's text; what a model thinks before it answers is text too."""
    if not chunk.get("choices"):
        return ""
    delta = chunk["choices"][0]["delta"]
    names = ("content", "reasoning", "reasoning_content")
    text: str = next((delta[name] for name in names if delta.get(name)), "")
    return text
