"""Ten tenants that ask for five times what the model can do: who gets how much, and how fast.

The engine is simulated, all else is real: keys, limits, the fair queue. Every tenant sends chats at
random moments (a Poisson process), whatever becomes of those before.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.table import Table

from bench.stack import Stack, running
from db import migrate
from tasks.contract.access import KeySpec, TenantSpec
from tasks.maintenance import api_keys

SLOTS, TOKENS, TOKENS_PER_S = 16, 40, 80.0
# The first token of an answer comes at once.
CAPACITY_PER_S = SLOTS * TOKENS_PER_S / (TOKENS - 1)
OVERLOAD = 5.0
TENANTS = 10
# Of a tenant that wait: none fills the backlog for the others.
QUEUED_EACH = 20
MODEL = {
    "name": "sim",
    "engine": "sim",
    "slots": SLOTS,
    "args": {"tokens-per-s": TOKENS_PER_S, "first-token-s": 0.0},
}
BODY = orjson.dumps(
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": TOKENS, "stream": True}
)
WEIGHTS: dict[str, Sequence[float]] = {
    "equal weights": [1.0] * TENANTS,
    "weights 3 and 1": [3.0, 1.0] * (TENANTS // 2),
}


@dataclass
class Served:
    """What a tenant got."""

    weight: float
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def run(console: Console, duration_s: float) -> None:
    """Runs the loads one after the other, and prints a table of each."""
    for name, weights in WEIGHTS.items():
        with TemporaryDirectory(prefix="sluice-bench-overload-") as home:
            served = _measure(Path(home), weights, duration_s)
        _print(console, name, served, duration_s)


def _measure(home: Path, weights: Sequence[float], duration_s: float) -> dict[str, Served]:
    stack = Stack(home, [MODEL], max_backlog=2 * TENANTS * QUEUED_EACH)
    migrate(stack.database_url)
    secrets = {f"t{n}": _key(stack, f"t{n}", weight) for n, weight in enumerate(weights)}
    served = {f"t{n}": Served(weight) for n, weight in enumerate(weights)}
    with running(stack):
        asyncio.run(_drive(stack.url, secrets, served, duration_s))
    return served


def _key(stack: Stack, tenant: str, weight: float) -> str:
    limits: Any = {"queued_jobs": QUEUED_EACH}
    api_keys.set_tenant(stack.database_url, tenant, TenantSpec(weight=weight, limits=limits))
    made = api_keys.create(stack.database_url, KeySpec(name="bench", tenant=tenant))
    return str(made["key"])


async def _drive(
    url: str, secrets: Mapping[str, str], served: Mapping[str, Served], duration_s: float
) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    client = httpx.AsyncClient(base_url=url, limits=limits, timeout=60, trust_env=False)
    async with client:
        end_s = time.monotonic() + duration_s
        async with asyncio.TaskGroup() as group:
            for tenant, secret in secrets.items():
                group.create_task(_send(client, secret, served[tenant], end_s))


async def _send(client: httpx.AsyncClient, secret: str, served: Served, end_s: float) -> None:
    rate = OVERLOAD * CAPACITY_PER_S / TENANTS
    asking: set[asyncio.Task[None]] = set()
    while time.monotonic() < end_s:
        await asyncio.sleep(random.expovariate(rate))
        task = asyncio.create_task(_ask(client, secret, served, end_s))
        asking.add(task)
        task.add_done_callback(asking.discard)
    for task in list(asking):
        task.cancel()


async def _ask(client: httpx.AsyncClient, secret: str, served: Served, end_s: float) -> None:
    begun_s, first = time.monotonic(), True
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    request = client.stream("POST", "/v1/chat/completions", content=BODY, headers=headers)
    async with request as answer:
        if answer.status_code != httpx.codes.OK:
            error = orjson.loads(await answer.aread())["error"]
            served.refused[f"{answer.status_code} {error['code']}"] += 1
            return
        async for line in answer.aiter_lines():
            if not line.startswith('data: {"') or time.monotonic() > end_s:
                continue
            if '"content"' in line:
                served.tokens += 1
                if first:
                    served.ttft_s.append(time.monotonic() - begun_s)
                    first = False


def _print(console: Console, name: str, served: Mapping[str, Served], duration_s: float) -> None:
    tokens = {tenant: one.tokens for tenant, one in served.items()}
    shares = [one.tokens / one.weight for one in served.values()]
    jain = sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))
    columns = ("tenant", "weight", "tokens/s", "share", "due", "TTFT p50", "TTFT p99", "refused")
    table = Table(*columns, title=name, box=None)
    for tenant, one in served.items():
        due = one.weight / sum(other.weight for other in served.values())
        ttft = sorted(one.ttft_s) or [float("nan")]
        refused = ", ".join(f"{count}x {what}" for what, count in one.refused.items())
        table.add_row(
            *(tenant, f"{one.weight:g}", f"{one.tokens / duration_s:.1f}"),
            *(f"{one.tokens / sum(tokens.values()):.1%}", f"{due:.1%}"),
            *(f"{ttft[len(ttft) // 2]:.2f} s", f"{ttft[int(len(ttft) * 0.99)]:.2f} s", refused),
        )
    console.print(table)
    goodput = sum(tokens.values()) / duration_s
    console.print(
        f"goodput {goodput:.0f} of {CAPACITY_PER_S * TOKENS:.0f} tokens/s; "
        f"Jain's index of tokens by weight {jain:.4f}\n"
    )
