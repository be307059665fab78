"""Engine processes that outlived their worker: detected before a new engine needs their memory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tasks.contract.errors import ConfigurationError
from tasks.contract.settings import get_settings


def _directory() -> Path:
    return get_settings().home / "run"


def refuse_orphans() -> None:
    """Checks this machine for engines of dead workers.

    Raises:
        ConfigurationError: one is alive, and still holds its memory.
    """
    for record in _directory().glob("engine-*.json"):
        engine = json.loads(record.read_text())
        try:
            process = psutil.Process(engine["pid"])
            is_same = process.create_time() == engine["create_time"]
            if is_same and process.status() != psutil.STATUS_ZOMBIE:
                if process.ppid() != engine["parent_pid"]:
                    raise ConfigurationError(
                        f"the engine of an earlier worker, process {process.pid}, still holds its "
                        f"memory; end it with `kill -9 {process.pid}` and start again"
                    )
                continue
        except psutil.NoSuchProcess:
            pass
        record.unlink(missing_ok=True)


@contextmanager
def recorded() -> Iterator[None]:
    """Within the block, this worker's engine processes are recorded."""
    _directory().mkdir(parents=True, exist_ok=True)
    records = []
    for child in psutil.Process().children(recursive=True):
        record = _directory() / f"engine-{child.pid}.json"
        content = {"pid": child.pid, "create_time": child.create_time(), "parent_pid": child.ppid()}
        record.write_text(json.dumps(content))
        records.append(record)
    try:
        yield
    finally:
        for record in records:
            record.unlink(missing_ok=True)
