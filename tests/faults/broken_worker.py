"""A worker of the model `sim` whose engine fails where a file in SLUICE_HOME tells it to.

`load` and `progress` raise, `close` does not return.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gpu_worker import worker as main
from gpu_worker.engines import engine
from gpu_worker.engines import sim as sim_engine
from gpu_worker.engines.engine import Load, Message, Receive, Send
from tasks.contract.models import Model


class BrokenEngine:
    """The sim engine, as long as nothing breaks it."""

    server = None

    def __init__(self, sim: sim_engine.SimEngine) -> None:
        self._sim = sim

    async def app(self, scope: Message, receive: Receive, send: Send) -> None:
        await self._sim.app(scope, receive, send)

    def load(self) -> Load:
        _break("load")
        return self._sim.load()

    def is_dead(self) -> bool:
        return self._sim.is_dead()

    def progress(self) -> int | None:
        _break("progress")
        return self._sim.progress()


def _file(name: str) -> Path:
    return Path(os.environ["SLUICE_HOME"]) / name


def _break(name: str) -> None:
    file = _file(name)
    if file.exists():
        file.unlink()
        raise LookupError(name)


async def _close() -> None:
    if _file("close").exists():
        await asyncio.Event().wait()


@asynccontextmanager
async def open_engine(model: Model) -> AsyncIterator[BrokenEngine]:
    async with sim_engine.open_engine(model) as sim:
        yield BrokenEngine(sim)
        await _close()


if __name__ == "__main__":
    engine.ENGINES["sim"] = "tests.faults.broken_worker"
    sys.exit(main.run("sim"))
