"""One EngineCore for several front ends, as `vllm serve --api-server-count` has it.

vLLM's own server ends with the first of its front ends that dies; here another one takes its place.
EngineCore greets each of its clients once, at its start, and a client waits for that: so a seat is
never taken again, and there are some to spare. Those that nobody sits in cost a connection each.
"""

import asyncio
import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from functools import partial
from typing import Any

from gpu_worker.engines import vllm_clients
from gpu_worker.engines.engine import Seat
from gpu_worker.engines.vllm import LOOK_S, make_way, started
from tasks.contract.errors import ConfigurationError
from tasks.contract.models import Model

log = logging.getLogger(__name__)

# Front ends that may die; with the next one the worker ends, and its supervisor starts it again.
SPARE_SEATS = 16
# EngineCore sends to its first client what is for none: statistics of steps without any output.
OWN_SEAT = 0


class VllmCore:
    """EngineCore, of which this process is a client without requests."""

    def __init__(self, client: Any, manager: Any, seats: Iterator[Seat]) -> None:
        self._client = client
        self._manager = manager
        self._seats = seats
        self._answers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = self._run(self._read())
        self._asking = self._run(self._ask())
        self._dropping: dict[int, asyncio.Task[None]] = {}

    def take_seat(self) -> Seat | None:
        return next(self._seats, None)

    def clear(self, seat: Seat) -> None:
        place = seat["client"]
        index = place["client_index"]
        if index not in self._dropping:
            self._dropping[index] = self._run(self._drop_outputs(place))
        self._run(self._abort(index))

    def is_dead(self) -> bool:
        ended = self._reading.done() or self._asking.done()
        return ended or bool(self._manager.finished_procs())

    def progress(self) -> int | None:
        """It answers between two steps: as long as it does, it makes some, if there is work."""
        return self._answers

    def close(self) -> None:
        """Stops asking."""
        for task in self._tasks:
            task.cancel()

    def _run(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # asyncio itself does not keep it
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)
        return task

    async def _read(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        with suppress(EngineDeadError):
            while True:
                await self._client.get_output_async()

    async def _ask(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        with suppress(EngineDeadError):
            while True:
                await vllm_clients.load_of(self._client, OWN_SEAT)
                self._answers += 1
                await asyncio.sleep(LOOK_S)

    async def _abort(self, index: int) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        with suppress(EngineDeadError):
            if count := await vllm_clients.abort(self._client, index):
                log.info("%d requests of front end %d ended with it", count, index)

    async def _drop_outputs(self, place: dict[str, Any]) -> None:
        """Reads what EngineCore still sends to a dead client.

        Unread, it would be kept, and with it the buffers of all that is sent to others later.
        """
        from vllm.utils.network_utils import make_zmq_socket
        from zmq.constants import SocketType

        address, listener = place["output_address"], place["output_listener"]
        with make_zmq_socket(self._client.ctx, address, SocketType.PULL, listener=listener) as left:
            while True:
                await left.recv_multipart()


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (failure := task.exception()):
        log.error("EngineCore cannot be asked or served", exc_info=failure)


@asynccontextmanager
async def open_core(model: Model) -> AsyncIterator[VllmCore]:
    """Starts EngineCore for the model's front ends; raises as `started` does."""
    async with started(model, partial(_launched, model)) as core:
        yield core


@asynccontextmanager
async def _launched(model: Model, args: Namespace) -> AsyncIterator[VllmCore]:
    """EngineCore, loaded, and this process its first client."""
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
    from vllm.v1.executor import Executor

    count = 1 + model.frontends + SPARE_SEATS
    config, has_statistics = _configure(args, model.frontends)
    executor = Executor.get_class(config)
    async with AsyncExitStack() as stack:
        listeners = bind_engine_zmq_listeners(config, count)
        stack.callback(listeners.cleanup)
        with launch_core_engines(config, executor, has_statistics, listeners.addresses) as launch:
            # Loads when the block ends; whatever happens there, EngineCore is to end as well.
            stack.callback(launch.engine_manager.shutdown, timeout=config.shutdown_timeout)
        places = _places(listeners, launch.tensor_queue)
        client = EngineCoreClient.make_async_mp_client(
            config, executor, False, places[OWN_SEAT], count, OWN_SEAT
        )
        stack.callback(client.shutdown)
        # A vLLM that has not loaded the plugin fails here.
        await vllm_clients.load_of(client, OWN_SEAT)
        make_way()
        seats = ({"args": args, "client": place} for place in places[OWN_SEAT + 1 :])
        yield stack.enter_context(closing(VllmCore(client, launch.engine_manager, seats)))


def _places(listeners: Any, tensor_queue: Any) -> list[dict[str, Any]]:
    """What vLLM's API servers are given, each with its index."""
    pairs = list(zip(listeners.inputs, listeners.outputs, strict=True))
    common: dict[str, Any] = {"client_count": len(pairs)}
    if tensor_queue is not None:
        common["tensor_queue"] = tensor_queue
    return [
        common
        | {
            "input_address": requests.address,
            "input_listener": requests.socket,
            "output_address": outputs.address,
            "output_listener": outputs.socket,
            "client_index": index,
        }
        for index, (requests, outputs) in enumerate(pairs)
    ]


def _configure(args: Namespace, count: int) -> tuple[Any, bool]:
    """EngineCore's configuration for so many clients, and whether it is to make statistics.

    Raises:
        ConfigurationError: there would be several EngineCores.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
    from vllm.usage.usage_lib import UsageContext

    given = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, given)
    given._api_process_count, given._api_process_rank = count, -1  # noqa: SLF001
    config = given.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    if config.parallel_config.data_parallel_size > 1:
        raise ConfigurationError(
            "`frontends` are of one engine, and `data-parallel-size` makes several; "
            "leave one of them out, or run several workers"
        )
    return config, not given.disable_log_stats
