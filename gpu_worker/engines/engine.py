"""What a worker needs of an engine. An engine is an ASGI app: job in, response out, byte for byte.

Another kind of engine is a module with an `open_engine`, named in ENGINES.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextlib import AbstractAsyncContextManager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from tasks.contract import processors
from tasks.contract.errors import ConfigurationError
from tasks.contract.job import Job
from tasks.contract.models import Model

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

ENGINES = {
    "vllm": "gpu_worker.engines.vllm",
    "sim": "gpu_worker.engines.sim",
    "remote": "gpu_worker.engines.remote",
}
# Engines with processes that several front ends can share.
SHARED = {"vllm": "gpu_worker.engines.vllm_core"}

# By default vLLM on a GPU has two front ends, where each has so much of its own.
BY_DEFAULT = 2
CORES_EACH, SLOTS_EACH = 4, 64
# With these arguments vLLM needs to be alone, or may.
OF_ONE_FRONT_END = ("config", "data-parallel", "enable-fault-tolerance")

Seat = dict[str, Any]
"""What one front end of several attaches to its engine with, once. Empty: it opens an own one."""


current_job: ContextVar[Job | None] = ContextVar("current_job", default=None)
"""The one that the current task answers."""


class Load(NamedTuple):
    """Requests inside the engine, in the running batch and waiting for it; and its KV cache."""

    running: int
    waiting: int
    kv_cache_usage: float = 0.0
    """0 to 1."""
    max_model_len: int | None = None
    """Most tokens of a request and its answer together, as far as the engine knows."""


class Watched(Protocol):
    """What may die or hang."""

    def is_dead(self) -> bool:
        """Whether the engine cannot answer any more, for good."""

    def progress(self) -> int | None:
        """Steps that it has made; None while it has nothing to do, or cannot hang by itself."""


class Engine(Watched, Protocol):
    """A loaded engine, on the event loop that opened it."""

    app: AsgiApp

    @property
    def server(self) -> tuple[str, int] | None:
        """Host and port of the server that it asks; None: it is the worker's own."""

    def load(self) -> Load:
        """What the engine is doing now; for one of several front ends, with its own requests."""


class Core(Watched, Protocol):
    """What several front ends share, in the process that started it."""

    def take_seat(self) -> Seat | None:
        """For another front end; None: there are no more."""

    def clear(self, seat: Seat) -> None:
        """Ends the requests of a front end that has ended; may be called again."""


def count_front_ends(model: Model, cores_per_gpu: int, metrics_bind: str) -> int:
    """As many as the entry says; by default as many as the machine has use for.

    One interpreter cannot feed an engine on a GPU (docs/gpu.md has the figures). An engine on a CPU
    computes on the cores that a second one would take. Metrics at a given port are of one process.
    """
    if model.frontends:
        return model.frontends
    names = [name.replace("_", "-") for name in model.args]
    is_alone = any(name.startswith(OF_ONE_FRONT_END) for name in names)
    if model.engine not in SHARED or is_alone or not metrics_bind.endswith(":0"):
        return 1
    return max(1, min(BY_DEFAULT, cores_per_gpu // CORES_EACH, model.slots // SLOTS_EACH))


def cores_per_gpu() -> int:
    """Of the machine's processors; 0 without a GPU that the installed vLLM runs on."""
    try:
        if "cpu" in version("vllm"):
            return 0
    except PackageNotFoundError:  # there is none, or the one for CPUs, which has a name of its own
        return 0
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) or Path("/dev/kfd").exists()
    return processors.count() // gpus if gpus else 0


def open_engine(model: Model, seat: Seat | None = None) -> AbstractAsyncContextManager[Engine]:
    """Loads the model's engine on entry, which may take minutes; ends its processes on exit.

    With a seat it attaches to an engine that is there.

    Raises:
        ConfigurationError: on entry, when the model's source or arguments are wrong.
    """
    module = import_module(ENGINES[model.engine])
    opened: AbstractAsyncContextManager[Engine]
    opened = module.attach(seat) if seat else module.open_engine(model)
    return opened


def open_core(model: Model) -> AbstractAsyncContextManager[Core]:
    """Loads on entry what the model's front ends will share; ends its processes on exit.

    Raises:
        ConfigurationError: on entry, when the model's source or arguments are wrong.
    """
    if model.engine not in SHARED:
        return nullcontext(Apart())
    opened: AbstractAsyncContextManager[Core]
    opened = import_module(SHARED[model.engine]).open_core(model)
    return opened


class Apart:
    """Front ends with nothing in common: each has a sim engine or a remote server by itself."""

    def take_seat(self) -> Seat | None:
        return {}

    def clear(self, seat: Seat) -> None:
        """Nothing is left of it."""

    def is_dead(self) -> bool:
        return False

    def progress(self) -> int | None:
        return None


Args = TypeVar("Args", bound=BaseModel)


def read_args(model: Model, args: type[Args]) -> Args:
    """The `args` of the model's entry, written with dashes or underscores.

    Raises:
        ConfigurationError: an argument is unknown or its value is refused.
    """
    try:
        return args(**{str(name).replace("-", "_"): value for name, value in model.args.items()})
    except ValidationError as refused:
        wrong = "; ".join(f"{error['loc'][0]}: {error['msg']}" for error in refused.errors())
        raise ConfigurationError(f"models.yaml, args of {model.name}: {wrong}") from None


async def read_body(receive: Receive) -> bytes:
    """The whole body of a request."""
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body


async def answer_unless_left(receive: Receive, answering: Coroutine[Any, Any, None]) -> None:
    """An app's answer to a request that has been read; a client that leaves ends it at once."""
    answer = asyncio.ensure_future(answering)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            answer.result()
    finally:
        answer.cancel()
        leaving.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
