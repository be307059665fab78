"""vLLM in this process: the same three calls that `vllm serve` makes, without its HTTP server.

All knowledge of vLLM's module paths is in the vllm*.py files.
"""

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psutil

from gpu_worker import affinity
from gpu_worker.engines import vllm_args, vllm_clients
from gpu_worker.engines import vllm_process as engine_process
from gpu_worker.engines import vllm_sockets as sockets
from gpu_worker.engines.engine import AsgiApp, Load, Message, Receive, Seat, Send
from gpu_worker.engines.sources import refuse_missing
from gpu_worker.replay_log import get_replay_log
from tasks.contract.errors import ConfigurationError, EngineLoadError
from tasks.contract.models import Model

log = logging.getLogger(__name__)

LOOK_S = 1.0

Opened = TypeVar("Opened")


class VllmEngine:
    """A running AsyncLLM and vLLM's own OpenAI app around it."""

    server = None

    def __init__(self, app: AsgiApp, client: Any) -> None:
        self._app = app
        self._client = client
        self._steps = 0
        _on_each_step(client, self._count_step)

    async def app(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request; its usage goes into the replay log, streamed or not."""
        await self._app(scope, receive, send)
        # vLLM's handlers leave it there for middleware.
        metadata = scope["state"].get("request_metadata")
        if metadata and metadata.final_usage_info:
            get_replay_log().usage = metadata.final_usage_info.model_dump(exclude_none=True)

    def load(self) -> Load:
        from prometheus_client import REGISTRY

        counts = ["vllm:num_requests_running", "vllm:num_requests_waiting"]
        usage = "vllm:kv_cache_usage_perc"  # 0 to 1, despite its name
        samples = {
            sample.name: sample.value
            for metric in REGISTRY.restricted_registry([*counts, usage]).collect()
            for sample in metric.samples
        }
        running, waiting = (int(samples.get(name, 0)) for name in counts)
        most = self._client.model_config.max_model_len
        return Load(running, waiting, samples.get(usage, 0.0), most)

    def is_dead(self) -> bool:
        return bool(self._client.errored)

    def progress(self) -> int | None:
        return self._steps if self._client.get_num_unfinished_requests() else None

    def _count_step(self) -> None:
        self._steps += 1


class AttachedEngine(VllmEngine):
    """One of several front ends of an EngineCore, which another process has started.

    It hears of the steps that made something of its own requests, and of some others: so it asks
    EngineCore, which answers between two steps, what it has of these, and whether it goes on.
    """

    def __init__(
        self, app: AsgiApp, client: Any, index: int, load: vllm_clients.ClientLoad
    ) -> None:
        super().__init__(app, client)
        self._load = load
        self._asking = asyncio.ensure_future(self._ask(index))

    def load(self) -> Load:
        return Load(*self._load, self._client.model_config.max_model_len)

    def is_dead(self) -> bool:
        has_no_answer = self._asking.done() and not self._asking.cancelled()
        return super().is_dead() or has_no_answer

    def close(self) -> None:
        """Stops asking."""
        self._asking.cancel()

    async def _ask(self, index: int) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            while True:
                await asyncio.sleep(LOOK_S)
                self._load = await vllm_clients.load_of(self._client.engine_core, index)
                self._count_step()
        except EngineDeadError:
            log.error("EngineCore is dead")


def _on_each_step(client: Any, note: Callable[[], None]) -> None:
    """Makes vLLM call `note` for every step of the engine, with output or without."""
    update = client.output_processor.update_scheduler_stats

    def update_and_note(stats: Any) -> None:
        note()
        update(stats)

    client.output_processor.update_scheduler_stats = update_and_note


@asynccontextmanager
async def open_engine(model: Model) -> AsyncIterator[VllmEngine]:
    """Starts vLLM's engine and builds its app; raises as `started` does."""
    async with started(model, _open) as engine:
        yield engine


@asynccontextmanager
async def attach(seat: Seat) -> AsyncIterator[AttachedEngine]:
    """Builds the app of one of several front ends (vllm_core.py)."""
    place = seat["client"]
    async with _building(seat["args"], place) as (app, client):
        index = place["client_index"]
        load = await vllm_clients.load_of(client.engine_core, index)
        with closing(AttachedEngine(app, client, index, load)) as engine:
            yield engine


@asynccontextmanager
async def started(
    model: Model, start: Callable[[Namespace], AbstractAsyncContextManager[Opened]]
) -> AsyncIterator[Opened]:
    """What `start` makes of the model's arguments: it starts EngineCore.

    Raises:
        ConfigurationError: vLLM is not installed, the model is not there, or vLLM refuses an
            argument.
        EngineLoadError: vLLM cannot load it.
    """
    if find_spec("vllm") is None:
        raise ConfigurationError(
            "vLLM is not installed here; install the extra `cpu` or `gpu`, "
            "or set SLUICE_MODEL to `sim` or to the URL of an OpenAI-compatible server"
        )
    refuse_missing(model)
    os.environ.update(vllm_args.environment(model))
    vllm_args.refuse_batch_invariance(model)
    # An allowed domain can redirect to one that is not.
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    with sockets.private_directory() as directory:
        os.environ["VLLM_RPC_BASE_PATH"] = directory
        args = vllm_args.parse(model)
        async with AsyncExitStack() as stack:
            with engine_process.mark_worker(Path(directory)) as failures:
                try:
                    opened = await stack.enter_async_context(start(args))
                except ConfigurationError:
                    raise
                except Exception as failure:  # whatever it is: vLLM's boundary
                    raise _explained(model, failure, failures) from failure
            yield opened


def _explained(model: Model, failure: Exception, failures: Path) -> EngineLoadError:
    cause = engine_process.root_cause(failures, failure)
    if cause == engine_process.describe(failure):  # no other process has logged it
        log.error("vLLM failed", exc_info=failure)
    return EngineLoadError(f"vLLM cannot load {model.name}: {cause}")


@asynccontextmanager
async def _open(args: Namespace) -> AsyncIterator[VllmEngine]:
    async with _building(args) as (app, client):
        make_way()
        yield VllmEngine(app, client)


@asynccontextmanager
async def _building(
    args: Namespace, place: dict[str, Any] | None = None
) -> AsyncIterator[tuple[AsgiApp, Any]]:
    """The app, and its client of EngineCore, which it starts unless it has a place at one."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.envs import enable_envs_cache

    from gpu_worker.engines.vllm_replay import make_continuable

    async with build_async_engine_client(args, client_config=place) as client:
        make_continuable(client)
        model_type = client.model_config.hf_config.model_type
        vllm_args.choose_tool_parser(args, model_type, client.get_tokenizer())
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await init_app_state(client, app.state, args, tasks)
        # vLLM's lifespan logs statistics, and freezes the heap: without that the collector stalls
        # the loop (8 ms between tokens against 3 ms).
        async with app.router.lifespan_context(app):
            # Nothing changes the environment from here on. EngineCore does the same for itself; in
            # the front end vLLM asks for a variable with every token.
            enable_envs_cache()
            yield app, client


def make_way() -> None:
    """Keeps this process off the processors that vLLM has bound its CPU engine to.

    Those of the engine's processes that are not bound share what is left, and step back there.
    """
    if not affinity.IS_SUPPORTED:
        return
    everywhere = affinity.processors(0)
    engine = {p.pid: affinity.processors(p.pid) for p in psutil.Process().children(recursive=True)}
    bound = [cpus for cpus in engine.values() if cpus < everywhere]
    free = everywhere.difference(*bound)
    if bound and free:
        affinity.confine(os.getpid(), free)
        for pid in (pid for pid, cpus in engine.items() if cpus == everywhere):
            affinity.step_back(pid)
