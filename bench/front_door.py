"""What the front door costs a request: a key, limits of all kinds, and the fair queue.

Stacks with a simulated engine that answers at once take turns, request by request: one without
keys, one whose client has a key with every limit, and, if given, another checkout, such as one
before there were keys.
"""

import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx
import orjson
from rich.console import Console
from rich.table import Table

from bench.stack import Stack, running
from db import migrate
from tasks.contract.access import KeySpec, Limits, TenantSpec
from tasks.maintenance import api_keys

ENDPOINT = "/v1/chat/completions"
OPEN, KEYED = "without keys", "with a key and limits"
WARM_UP = 200
AT_MOST_MS = 1.0
MODEL = {"name": "sim", "engine": "sim", "args": {"tokens-per-s": 0, "first-token-s": 0}}
BODY = orjson.dumps(
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "stream": True}
)
MOST = 2**50
LIMITS = Limits(
    requests_per_minute=MOST,
    tokens_per_minute=MOST,
    parallel_requests=MOST,
    queued_jobs=MOST,
    tokens_per_day=MOST,
    tokens_per_month=MOST,
)


@dataclass(frozen=True)
class Client:
    """One connection to a stack."""

    http: httpx.Client
    headers: Mapping[str, str]

    def first_token_s(self) -> float:
        """Seconds from a request until the first event of its answer."""
        begun_s = time.perf_counter()
        asked = self.http.stream("POST", ENDPOINT, content=BODY, headers=self.headers)
        with asked as answer:
            answer.raise_for_status()
            parts = answer.iter_raw()
            next(part for part in parts if b'"content"' in part)
            took_s = time.perf_counter() - begun_s
            for _ in parts:
                pass
        return took_s


def run(console: Console, rounds: int, requests: int, other: Path | None) -> list[str]:
    """Runs and prints the comparison; returns what went wrong."""
    names = [OPEN, KEYED] if other is None else [str(other), OPEN, KEYED]
    medians_ms: dict[str, list[float]] = defaultdict(list)
    with TemporaryDirectory(prefix="sluice-bench-door-") as home, ExitStack() as up:
        with console.status("starting"):
            clients = {}
            for number, name in enumerate(names):
                (place := Path(home) / str(number)).mkdir()
                clients[name] = _start(up, place, name, other if name == str(other) else None)
        _take_turns(clients, WARM_UP)
        for number in range(1, rounds + 1):
            console.print(f"round {number} of {rounds}")
            for name, took_s in _take_turns(clients, requests).items():
                medians_ms[name].append(median(took_s) * 1e3)
    table = Table("first token, p50", "ms", f"more than {names[0]}", box=None)
    for name in names:
        pairs = zip(medians_ms[name], medians_ms[names[0]], strict=True)
        more_ms = [one - first for one, first in pairs]
        spread = f"{median(more_ms):+.2f} ({min(more_ms):+.2f}…{max(more_ms):+.2f})"
        table.add_row(name, f"{median(medians_ms[name]):.2f}", spread)
    console.print(table)
    over_ms = median(medians_ms[KEYED]) - median(medians_ms[names[0]])
    return [f"{over_ms:.2f} ms more are over {AT_MOST_MS} ms"] if over_ms > AT_MOST_MS else []


def _start(up: ExitStack, home: Path, name: str, source: Path | None) -> Client:
    stack = Stack(home, [MODEL])
    headers = {"Content-Type": "application/json"}
    if source:
        stack.env["PYTHONPATH"] = str(source)
    if name == KEYED:
        migrate(stack.database_url)
        api_keys.set_tenant(stack.database_url, "acme", TenantSpec(limits=LIMITS))
        spec = KeySpec(name="bench", tenant="acme", limits=LIMITS)
        secret = api_keys.create(stack.database_url, spec)["key"]
        headers["Authorization"] = f"Bearer {secret}"
    up.enter_context(running(stack))
    http = up.enter_context(httpx.Client(base_url=stack.url, timeout=60, trust_env=False))
    return Client(http, headers)


def _take_turns(clients: Mapping[str, Client], requests: int) -> dict[str, list[float]]:
    took_s: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(requests):
        for name, client in clients.items():
            took_s[name].append(client.first_token_s())
    return took_s
