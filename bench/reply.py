"""Reading one HTTP/1.1 reply as it arrives: status, chunks, server-sent events and their times."""

import json
import re

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
_EMPTY_TEXT = b'"content":""'
_TEXT = b'"content":"'
_USAGE = b'"usage":{'
_ERROR = b'data: {"error"'
_REASONING = re.compile(rb'"reasoning(_content)?":"[^"]')


class Reply:
    """A reply of /v1/chat/completions, streamed or whole, while and after it arrives."""

    def __init__(self, asked_at_s: float) -> None:
        self.asked_at_s = asked_at_s
        self.text_at_s: list[float] = []  # when each event with text was read
        self.ended_at_s = asked_at_s  # when it was complete
        self.status = 0
        self.is_stream = False
        self.is_complete = False
        self.has_done = False
        self.has_error = False  # told in the middle of a stream
        self.closes_connection = False
        self.text = b""  # of the body, what is not taken apart into events yet
        self._usage = b""
        self._head = b""
        self._unread = b""  # the beginning of a chunk
        self._is_chunked = False
        self._length: int | None = None

    @property
    def tokens(self) -> int:
        """Completion tokens by the server's own count; 0 if it gave none."""
        try:
            return int(json.loads(self._usage or self.text)["usage"]["completion_tokens"])
        except (ValueError, KeyError, TypeError):
            return 0

    @property
    def ttft_s(self) -> float:
        """From sending the request to the first event with text."""
        return self.text_at_s[0] - self.asked_at_s

    @property
    def tpot_s(self) -> float:
        """Per token after the first one; 0 where there is no other."""
        return (self.text_at_s[-1] - self.text_at_s[0]) / max(self.tokens - 1, 1)

    def feed(self, data: bytes, now_s: float) -> None:
        """Takes in what was just read from the socket."""
        if not self.status:
            self._head += data
            head, blank_line, data = self._head.partition(b"\r\n\r\n")
            if not blank_line:
                return
            self._read_head(head.lower())
        self.text += self._dechunk(data) if self._is_chunked else data
        if self.is_stream:
            self._take_events(now_s)
            self.is_complete = self.is_complete or (self.has_done and not self._is_chunked)
        elif not self._is_chunked:
            self.is_complete = len(self.text) == self._length

    def _read_head(self, head: bytes) -> None:
        self.status = int(head[9:12])
        self.is_stream = b"text/event-stream" in head
        # A gateway may repeat its server's headers under longer names.
        self.closes_connection = b"\r\nconnection: close" in head
        self._is_chunked = b"\r\ntransfer-encoding: chunked" in head
        if length := _CONTENT_LENGTH.search(head):
            self._length = int(length[1])

    def _dechunk(self, data: bytes) -> bytes:
        unread = self._unread + data
        chunks = []
        start = 0
        while (line_end := unread.find(b"\r\n", start)) >= 0:
            size = int(unread[start:line_end], 16)
            end = line_end + 2 + size
            if len(unread) < end + 2:
                break
            start = end + 2
            if size == 0:
                self.is_complete = True
                break
            chunks.append(unread[line_end + 2 : end])
        self._unread = unread[start:]
        return b"".join(chunks)

    def _take_events(self, now_s: float) -> None:
        """Times the events with text; the role, the usage and keep-alives are not text.

        What a model thinks before it answers is text too.
        """
        *events, self.text = self.text.split(b"\n\n")
        for event in events:
            if _USAGE in event:  # gateways give it a choice without text
                self._usage = event[event.index(b"{") :]
            if _TEXT in event:
                if _EMPTY_TEXT not in event:
                    self.text_at_s.append(now_s)
            elif event.endswith(b"data: [DONE]"):
                self.has_done = True
            elif _ERROR in event:
                self.has_error = True
            elif _REASONING.search(event):
                self.text_at_s.append(now_s)
