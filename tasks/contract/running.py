"""The `sluice up` that runs in a state directory, as other commands of the same user find it.

It writes its settings into a file, and holds a lock on that file as long as it lives: one that
nobody holds is left from one that was killed.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def record(home: Path) -> Path:
    """Where the settings are; only its user may read it, as it holds Redis's password."""
    return home / "run" / "up.json"


@contextmanager
def announced(home: Path, settings: dict[str, str]) -> Iterator[None]:
    """Within the block, other commands find these settings."""
    path = record(home)
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump(settings, file)
        file.flush()
        draft.replace(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def find(home: Path) -> dict[str, str]:
    """The settings of the `sluice up` that runs in this home; none when none does."""
    try:
        with record(home).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                settings: dict[str, str] = json.load(file)
                return settings
    except OSError:
        pass
    return {}
