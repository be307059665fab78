"""The sockets of vLLM's processes: in a directory of this worker's own, removed with it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tasks.contract.settings import get_settings

NAME = "sluice-ipc-"
# A socket's path has 107 bytes at most; vLLM's names take 37 of them, ours about 25.
LONGEST_PARENT_BYTES = 45


@contextmanager
def private_directory() -> Iterator[str]:
    """A directory that only this user can enter. Removes those of killed workers as well."""
    home, shared = get_settings().home / "run", Path(tempfile.gettempdir())
    home.mkdir(parents=True, exist_ok=True)
    for parent in (home, shared):
        _sweep(parent)
    parent = home if len(os.fsencode(home)) <= LONGEST_PARENT_BYTES else shared
    directory = tempfile.mkdtemp(prefix=f"{NAME}{os.getpid()}-", dir=parent)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Removes this user's directories of dead workers."""
    for left in parent.glob(f"{NAME}*"):
        pid, _, _ = left.name.removeprefix(NAME).partition("-")
        with suppress(FileNotFoundError):
            is_ours = left.lstat().st_uid == os.getuid() and not left.is_symlink()
            if is_ours and pid.isdecimal() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
