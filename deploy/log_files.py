"""The logs of child processes, which write them directly: bounded, whatever they print."""

from collections.abc import Callable
from io import FileIO
from pathlib import Path

MOST_BYTES = 20_000_000
MOST_COPIED_BYTES = 5 * MOST_BYTES
PIECE_BYTES = 1_000_000
KEPT = 3


def begin(log: Path) -> None:
    """Puts the log of an earlier run aside."""
    if log.exists():
        _shift(log)
        log.replace(_older(log, 1))


def rotate(log: Path, report: Callable[[str], None]) -> None:
    """Copies a log that has grown long to `.log.1`, and empties it.

    Its process need not be notified, nor end with this one: its file is opened for appending, and
    it goes on at the new end. What it prints in the microseconds between copy and emptying is lost.
    """
    if not log.exists() or log.stat().st_size < MOST_BYTES:
        return
    _shift(log)
    with log.open("r+b", buffering=0) as file:
        try:
            _copy(file, _older(log, 1))
        except OSError as failed:
            # Most likely the disk is full: the log must not keep it so.
            _older(log, 1).unlink(missing_ok=True)
            report(f"{log.name} is dropped, as it cannot be copied: {failed}")
        file.truncate(0)


def _copy(file: FileIO, path: Path) -> None:
    with path.open("wb") as copy:
        # Bounded, in case its process prints faster than this copies.
        for _ in range(MOST_COPIED_BYTES // PIECE_BYTES):
            if not (piece := file.read(PIECE_BYTES)):
                break
            copy.write(piece)
            copy.flush()


def _shift(log: Path) -> None:
    for number in range(KEPT - 1, 0, -1):
        if _older(log, number).exists():
            _older(log, number).replace(_older(log, number + 1))


def _older(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number}")
