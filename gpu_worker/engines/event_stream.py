"""A server's stream of events, however it frames them, as the rest of Sluice expects it.

Each entry of a job's log is one event, `data: X` and a blank line. Servers end lines in CR LF, put
comments in between, and several events into one write.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator

from tasks.contract.job_errors import StreamBrokenError

DONE = b"[DONE]"
# Of one event that has not ended. The longest that make sense hold an image.
MOST_BYTES = 10_000_000
_LINE_END = re.compile(rb"\r\n|\n|\r")
# Without a name it is a comment. JSON is no field.
_FIELD = re.compile(rb"(?s)([\w-]*)(?:: ?(.*))?")


def frame(data: bytes) -> bytes:
    """The event that holds this data, which is one line."""
    return b"data: " + data + b"\n\n"


async def read_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event, in one line; without names and ids, which are the server's own.

    Raises:
        StreamBrokenError: an event is too long, or the stream ends in the midst of one.
    """
    reader = _Reader()
    async for piece in pieces:
        for data in reader.feed(piece):
            yield data
    if data := reader.end():
        yield data


class _Reader:
    """Takes bytes as they come, and gives the data of events that have ended."""

    def __init__(self) -> None:
        self._line: list[bytes] = []
        """Pieces of a line that has not ended."""
        self._data: list[bytes] = []
        """Lines of an event that has not ended."""
        self._size = 0
        self._follows_cr = False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of the events that end in this piece."""
        # A CR ends its line at once: what comes next may be long in coming.
        text = piece.removeprefix(b"\n") if self._follows_cr else piece
        self._follows_cr = piece.endswith(b"\r")
        *ended, rest = _LINE_END.split(text)
        for end in ended:
            line = self._end_line(end)
            if line:
                self._add(line)
            elif data := self._end_event():
                yield data
        self._line.append(rest)
        self._size += len(rest)
        if self._size > MOST_BYTES:
            raise StreamBrokenError(f"an event of the answer is longer than {MOST_BYTES:,} bytes")

    def end(self) -> bytes:
        """The data of a last event that only lacks its blank line; b"" if there is none."""
        if line := self._end_line(b""):
            self._add(line)
        data = self._end_event()
        if data and not _is_whole(data):
            raise StreamBrokenError("the answer ended in the midst of an event")
        return data

    def _end_line(self, end: bytes) -> bytes:
        line = b"".join([*self._line, end])
        self._line.clear()
        self._size += len(end)
        return line

    def _add(self, line: bytes) -> None:
        field = _FIELD.fullmatch(line)
        if field is None:
            self._data.append(line)  # some refuse in bare JSON what was asked for as a stream
        elif field[1] == b"data":
            self._data.append(field[2] or b"")

    def _end_event(self) -> bytes:
        # By the rule of SSE a line feed stands between them; in JSON that is white space.
        data = b" ".join(self._data).strip()
        self._data.clear()
        self._size = 0
        return data


def _is_whole(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return data == DONE
    return True
