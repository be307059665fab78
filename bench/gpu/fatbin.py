"""CUDA libraries with code for one architecture only: the rest becomes zeros, which pack well.

A library holds containers ("fatbins") of the same kernels for several architectures. Headers and
sizes stay as they are, so no offset changes and the driver finds the entry that it found before.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = b"\x50\xed\x55\xba"
# Of a container: magic, version, bytes of this header, bytes after it.
_CONTAINER = struct.Struct("<4sHHQ")
# Of an entry: kind, two bytes unused, bytes of this header, bytes after it; later the architecture.
_ENTRY = struct.Struct("<HHIQ")
_ARCHITECTURE = struct.Struct("<I")
_ARCHITECTURE_AT, _LEAST_HEADER, _MOST_HEADER = 28, 32, 4096
_MACHINE_CODE = 2


class Entry(NamedTuple):
    """The code of a container for one architecture."""

    is_machine_code: bool
    architecture: int
    start: int
    end: int


def thin(library: bytes, architecture: int) -> bytes:
    """The library without code that a GPU of that architecture does not run (90 for an H100).

    A container without machine code for it keeps what the driver may compile or run there instead:
    all that is for older ones. A container that cannot be read stays whole.
    """
    thinned = bytearray(library)
    for start, end in _containers(library):
        entries = _entries(library, start, end)
        if any(one.is_machine_code and one.architecture == architecture for one in entries):
            useless = [
                one
                for one in entries
                if not (one.is_machine_code and one.architecture == architecture)
            ]
        else:
            useless = [one for one in entries if one.architecture > architecture]
        for one in useless:
            thinned[one.start : one.end] = bytes(one.end - one.start)
    return bytes(thinned)


def _containers(library: bytes) -> Iterator[tuple[int, int]]:
    """Where the entries of each container begin and end."""
    at = library.find(MAGIC)
    while at >= 0:
        after = at + 4
        if at + _CONTAINER.size <= len(library):
            _, version, header, size = _CONTAINER.unpack_from(library, at)
            end = at + header + size
            if version == 1 and header == _CONTAINER.size and size and end <= len(library):
                yield at + header, end
                after = end
        at = library.find(MAGIC, after)


def _entries(library: bytes, start: int, end: int) -> list[Entry]:
    """All entries; none if one of them is not as expected."""
    found = []
    at = start
    while at + _LEAST_HEADER <= end:
        kind, _, header, size = _ENTRY.unpack_from(library, at)
        (architecture,) = _ARCHITECTURE.unpack_from(library, at + _ARCHITECTURE_AT)
        code = at + header
        if not _LEAST_HEADER <= header <= _MOST_HEADER or code + size > end:
            return []
        found.append(Entry(kind == _MACHINE_CODE, architecture, code, code + size))
        at = code + size
    return found
