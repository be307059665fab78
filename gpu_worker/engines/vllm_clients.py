"""What EngineCore is asked for by each of several front ends, its clients, and what it answers.

vLLM's EngineCore serves several clients, but does not tell apart what each of them has there: its
statistics are of all, and the requests of a client that dies run on to their ends. Clients may call
any method of it by name; here it gets two more, when it starts (vllm_process.py).
"""

import sys
from typing import Any, NamedTuple

LOAD = "sluice_client_load"
ABORT = "sluice_abort_client"
_CORE_MODULE = "vllm.v1.engine.core"


class ClientLoad(NamedTuple):
    """Requests of one client, and the KV cache of all."""

    running: int
    waiting: int
    kv_cache_usage: float
    """0 to 1."""


def teach_engine_core() -> None:
    """Adds the two methods, in a process that has loaded EngineCore."""
    if module := sys.modules.get(_CORE_MODULE):
        setattr(module.EngineCore, LOAD, _load)
        setattr(module.EngineCore, ABORT, _abort)


async def load_of(client: Any, index: int) -> ClientLoad:
    """What EngineCore has of the client with that index; it answers between two steps.

    Raises:
        EngineDeadError: it is dead.
    """
    return ClientLoad(*await client.call_utility_async(LOAD, index))


async def abort(client: Any, index: int) -> int:
    """Ends all requests of the client with that index; returns how many there were.

    Raises:
        EngineDeadError: EngineCore is dead.
    """
    return int(await client.call_utility_async(ABORT, index))


def _requests(core: Any, index: int) -> list[Any]:
    return [one for one in core.scheduler.requests.values() if one.client_index == index]


def _load(core: Any, index: int) -> list[float]:
    """Is a method of EngineCore."""
    own = _requests(core, index)
    running = sum(request.status.name == "RUNNING" for request in own)
    return [running, len(own) - running, core.scheduler.kv_cache_manager.usage]


def _abort(core: Any, index: int) -> int:
    """Is a method of EngineCore."""
    own = [request.request_id for request in _requests(core, index)]
    core.abort_requests(own)
    return len(own)
