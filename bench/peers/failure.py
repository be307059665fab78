"""kill -9 of an engine under 32 streams: what the clients of each server see.

Sluice has two workers of the simulated engine, and the gateways have two servers of it behind them.
vLLM's own server has its only engine; the simulated one's server alone is there to compare.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import uvloop

from bench.client import Connection
from bench.figures import Report
from bench.measurement import Load
from bench.peers import servers
from bench.peers.servers import Gateway, sim_server
from bench.reply import Reply
from bench.stack import Stack, running
from bench.stacks import vllm_server
from tasks.contract.models import Model, get_catalog

MODEL = Model(name="sim", engine="sim", args={"tokens-per-s": 20, "first-token-s": 0})
STREAMS, TOKENS = 32, 200
# The kill comes when all streams have begun, or after so long.
BEGIN_S = 8.0
LOOK_S = 0.05
# What are asked for right after the kill.
NEXT_TOKENS = 10
# Without a word for so long, a stream has waited for something to be repaired.
PAUSE_S = 1.0
HANG_S = 90.0
WHOLE = ("undisturbed", "resumed")


class Target(NamedTuple):
    """Where clients ask, and what kills an engine behind it."""

    url: str
    model: str
    kill: Callable[[], None]


def measure(report: Report, home: Path) -> None:
    """Kills an engine of each server in turn, and counts how its streams end."""
    for name, start in SETUPS.items():
        report.console.print(f"kill -9: {name}")
        (place := home / name).mkdir()
        with start(place) as target:
            before, after = uvloop.run(_under_fire(target))
        whole = sum(before[outcome] for outcome in WHOLE)
        aim: dict[str, float] = {"at_least": STREAMS} if name == servers.SLUICE else {}
        report.add(f"kill -9, {name}: whole answers", f"of {STREAMS}", [whole], **aim)
        report.notes.append(
            f"kill -9, {name}: {_told(before)}; {STREAMS} new requests right after: {_told(after)}"
        )


def _told(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())


async def _under_fire(target: Target) -> tuple[Counter[str], Counter[str]]:
    """How the streams end that an engine is killed under, and those that are asked for then."""
    load = Load(target.url, target.model, STREAMS, STREAMS, TOKENS)
    begun: list[Connection] = []
    streaming = asyncio.create_task(_ask_all(load, begun))
    for _ in range(round(BEGIN_S / LOOK_S)):
        if sum(bool(one.reply.text_at_s) for one in begun) == STREAMS:
            break
        await asyncio.sleep(LOOK_S)
    target.kill()
    after = await _ask_all(replace(load, max_tokens=NEXT_TOKENS, seed=2), [])
    return await streaming, after


async def _ask_all(load: Load, begun: list[Connection]) -> Counter[str]:
    asking = [_ask(load, request, begun) for request in load.http_requests()]
    return Counter(await asyncio.gather(*asking))


async def _ask(load: Load, request: bytes, begun: list[Connection]) -> str:
    """How the answer ends; `begun` has what it comes on."""
    loop = asyncio.get_running_loop()
    try:
        _, connection = await loop.create_connection(Connection, *load.address)
    except OSError:
        return "not connected"
    begun.append(connection)
    try:
        async with asyncio.timeout(HANG_S):
            return _outcome(await connection.ask(request), load.max_tokens)
    except TimeoutError:
        return "without an end"
    finally:
        connection.close()


def _outcome(reply: Reply, tokens: int) -> str:
    """What a client sees; the simulated engine sends each token as an event of its own."""
    if reply.status != 200:
        return f"status {reply.status}" if reply.status else "closed without an answer"
    if reply.has_error:
        return "error in mid-stream"
    if not (reply.is_complete and reply.has_done):
        return "broken off"
    received = len(reply.text_at_s)
    if received != tokens:
        return "cut short, as if whole" if received < tokens else "tokens doubled"
    longest_s = max((later - at for at, later in pairwise(reply.text_at_s)), default=0.0)
    return "resumed" if longest_s > PAUSE_S else "undisturbed"


@contextmanager
def _sluice(home: Path) -> Iterator[Target]:
    # Set even when empty: nothing of the user's deployment may be used.
    urls = {"bus_url": "", "database_url": "", "model": ""}
    stack = Stack(home, [MODEL.model_dump(mode="json")], **urls)

    def kill() -> None:
        max(stack.workers, key=lambda worker: len(stack.jobs_of(worker))).kill()

    with running(stack, workers=2):
        yield Target(stack.url, MODEL.name, kill)


@contextmanager
def _behind(gateway: Gateway, home: Path) -> Iterator[Target]:
    with ExitStack() as up:
        engines = []
        for number in range(2):
            (place := home / str(number)).mkdir()
            engines.append(up.enter_context(sim_server(MODEL, place)))
        front = up.enter_context(gateway(MODEL.name, [each.url for each in engines], home))
        yield Target(front.url, MODEL.name, _killing(engines[0].root_pid))


@contextmanager
def _vllm(home: Path) -> Iterator[Target]:
    model = get_catalog().default
    with vllm_server(model, home) as server:
        roles = {usage.role: pid for pid, usage in server.snapshot().items()}
        yield Target(server.url, model.name, _killing(roles["EngineCore"]))


@contextmanager
def _alone(home: Path) -> Iterator[Target]:
    with sim_server(MODEL, home) as engine:
        yield Target(engine.url, MODEL.name, _killing(engine.root_pid))


def _killing(pid: int) -> Callable[[], None]:
    return partial(os.kill, pid, signal.SIGKILL)


SETUPS: dict[str, Callable[[Path], AbstractContextManager[Target]]] = {
    servers.SLUICE: _sluice,
    servers.LITELLM: partial(_behind, servers.litellm),
    servers.ROUTER: partial(_behind, servers.vllm_router),
    servers.VLLM: _vllm,
    servers.ALONE: _alone,
}
