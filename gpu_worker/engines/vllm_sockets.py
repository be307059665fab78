"""The sockets of vLLM's processes: in a directory of this worker's own, removed with it."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.contract.settings import get_settings

NAME = "sluice-ipc-"
# Whoever holds the lock of this file owns its directory. A pid would not do: in containers, which
# may share the state directory, each worker is process 1.
LOCK = "lock"
# A socket's path has 107 bytes at most; vLLM's names take 37 of them, ours 20.
LONGEST_PARENT_BYTES = 45


@contextmanager
def private_directory() -> Iterator[str]:
    """A directory that only this user can enter. Removes those of killed workers as well."""
    home, shared = get_settings().home / "run", Path(tempfile.gettempdir())
    home.mkdir(parents=True, exist_ok=True)
    for parent in (home, shared):
        _sweep(parent)
    parent = home if len(os.fsencode(home)) <= LONGEST_PARENT_BYTES else shared
    directory, lock = _make(parent)
    try:
        yield str(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=NAME, dir=parent))
        lock = _lock(directory)
        if lock is not None:
            return directory, lock
        # Another worker has swept it before it was locked.


def _lock(directory: Path) -> int | None:
    """Takes the lock, which ends with the open file that is returned; None if it is taken.

    No program that this one starts gets the file, so that no child keeps the lock.
    """
    try:
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode=0o600)
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last owner may have removed the file after it was opened here.
        if os.fstat(lock).st_nlink:
            return lock
    os.close(lock)
    return None


def _sweep(parent: Path) -> None:
    """Removes this user's directories of dead workers."""
    for left in parent.glob(f"{NAME}*"):
        with suppress(OSError):
            is_ours = left.lstat().st_uid == os.getuid() and not left.is_symlink()
            lock = _lock(left) if is_ours else None
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
