"""Sluice, vLLM's own server and the gateways under the same load, in interleaved rounds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.figures import Report
from bench.measurement import Load
from bench.peers import turns
from bench.peers.servers import ALONE, GATEWAYS, LITELLM, ROUTER, SLUICE, VLLM, sim_server
from bench.rounds import REQUESTS, Round
from bench.stacks import Stack, StackError, sluice, vllm_server
from tasks.contract.models import Model, get_catalog

STREAMS = 64
# The relay: each stream as fast as a model on a GPU makes it, so that no two tokens come at once.
RELAYED = {"tokens-per-s": 40, "first-token-s": 0}
RELAYED_TOKENS, RELAYED_REQUESTS = 256, 192
# The overhead: whole answers of one token.
AT_ONCE = {"tokens-per-s": 0, "first-token-s": 0}
CLIENTS, WHOLE_REQUESTS, HALF_RATE_S = 32, 2000, 20
ALL_CPU = "CPU is of all of a server's processes; Sluice's include the engine's own"


def serve(report: Report, home: Path, rounds: int, scale: float) -> None:
    """64 streams of vLLM: its own server, Sluice, and the gateways in front of that server."""
    model = get_catalog().default
    if model.engine != "vllm":
        raise StackError(f"{model.name} is not served by vLLM; choose another model")
    requests = max(round(REQUESTS[STREAMS] * scale), STREAMS)
    with ExitStack() as up:
        stacks = [up.enter_context(start(model, home)) for start in (vllm_server, sluice)]
        engines = [stacks[0].url]
        stacks += [up.enter_context(start(model.name, engines, home)) for start in GATEWAYS]
        done = turns.take_turns(
            stacks,
            rounds,
            lambda stack, number: Load(stack.url, model.name, STREAMS, requests, seed=number),
            report.console.print,
        )
    report.errors += turns.errors(done)
    for name in (VLLM, SLUICE, LITELLM, ROUTER):
        report.add(f"64 streams, {name}: requests", "/s", turns.values(done, name, turns.per_s))
        for percentile in ("p50", "p99"):
            ttft_ms = [getattr(one.ttft_ms, percentile) for one in _seen(done, name)]
            report.add(f"64 streams, {name}: TTFT {percentile}", "ms", ttft_ms)
    _compare(report, "64 streams", done, turns.per_s, {LITELLM: 4.0, ROUTER: None, VLLM: None})


def relay(report: Report, home: Path, rounds: int, scale: float) -> None:
    """Streams of the simulated engine: what they cost the process that clients talk to."""
    requests = max(round(RELAYED_REQUESTS * scale), STREAMS)
    with _on_sim(RELAYED, home) as (model, stacks, _):
        done = turns.take_turns(
            stacks,
            rounds,
            lambda stack, number: Load(
                stack.url, model, STREAMS, requests, max_tokens=RELAYED_TOKENS, seed=number
            ),
            report.console.print,
        )
    report.errors += turns.errors(done)
    for name in (SLUICE, LITELLM, ROUTER):
        per_core = turns.values(done, name, turns.chunks_per_core_s)
        report.add(f"relay, {name}: chunks per core", "/s", per_core)
        per_1000 = turns.values(done, name, turns.cpu_ms_per_1000_chunks)
        report.add(f"relay, {name}: CPU of 1,000 chunks", "ms", per_1000)
        chunks = [one.events / one.tokens for one in _seen(done, name)]
        report.add(f"relay, {name}: chunks per token", "", chunks)
    report.notes.append(ALL_CPU)
    aims = {LITELLM: 10.0, ROUTER: None}
    _compare(report, "relay per core", done, turns.chunks_per_core_s, aims)


def answer(report: Report, home: Path, rounds: int, scale: float) -> None:
    """Whole answers of an engine that answers at once: as many as can be, then half as many."""
    requests = max(round(WHOLE_REQUESTS * scale), CLIENTS)
    with _on_sim(AT_ONCE, home) as (model, gateways, engine):
        stacks = [*gateways, engine]
        load = Load("", model, CLIENTS, requests, max_tokens=1, whole=True)

        def at_most(stack: Stack, number: int) -> Load:
            return replace(load, url=stack.url, seed=number)

        done = turns.take_turns(stacks, rounds, at_most, report.console.print)

        def at_half(stack: Stack, number: int) -> Load:
            rate = median(turns.values(done, stack.name, turns.per_s)) / 2
            count = max(round(rate * HALF_RATE_S * scale), CLIENTS)
            return replace(at_most(stack, number), requests=count, per_s=rate)

        calm = turns.take_turns(stacks, rounds, at_half, report.console.print)
    report.errors += turns.errors(done) + turns.errors(calm)
    for name in (SLUICE, LITELLM, ROUTER, ALONE):
        report.add(f"whole, {name}: requests", "/s", turns.values(done, name, turns.per_s))
        if name != ALONE:
            per_core = turns.values(done, name, turns.requests_per_core_s)
            report.add(f"whole, {name}: requests per core", "/s", per_core)
        report.add(f"whole, {name}: CPU", "ms", turns.values(done, name, turns.cpu_ms_per_request))
        for percentile in ("p50", "p99"):
            took_ms = [getattr(one.end_to_end_ms, percentile) for one in _seen(calm, name)]
            report.add(f"whole, {name}: {percentile} at half the rate", "ms", took_ms)
    aims = {LITELLM: None, ROUTER: None}
    _compare(report, "whole, per core", done, turns.requests_per_core_s, aims)
    report.notes.append(ALL_CPU)


def _seen(done: Sequence[Round], name: str) -> list[Any]:
    return [one.measurement for one in done if one.stack == name and one.number]


def _compare(
    report: Report,
    what: str,
    done: Sequence[Round],
    figure: turns.Figure,
    aims: Mapping[str, float | None],
) -> None:
    """Sluice's figure over that of each of the others, and how much it is meant to be."""
    for other, least in aims.items():
        aim: dict[str, float] = {} if least is None else {"at_least": least}
        found = turns.ratios(done, SLUICE, other, figure)
        report.add(f"{what}, {SLUICE} / {other}", "x", found, **aim)


@contextmanager
def _on_sim(args: dict[str, Any], home: Path) -> Iterator[tuple[str, list[Stack], Stack]]:
    """The model's name; Sluice and the gateways on a simulated engine; its server itself."""
    model = Model(name="sim", engine="sim", args=args)
    with ExitStack() as up:
        engine = up.enter_context(sim_server(model, home))
        stacks = [up.enter_context(sluice(model, home))]
        stacks += [up.enter_context(start(model.name, [engine.url], home)) for start in GATEWAYS]
        yield model.name, stacks, engine
