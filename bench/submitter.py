"""The client that submits jobs: a process of its own, with one line of JSON as input and output.

A closed loop over keep-alive connections, with the connection of the other load client.
"""

import asyncio
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Self

import uvloop

from bench.client import Connection
from bench.measurement import percentile_ms


@dataclass(frozen=True)
class Order:
    """What is submitted, and over how many connections at once."""

    port: int
    model: str
    jobs: int
    clients: int = 32

    def http_requests(self) -> Iterator[bytes]:
        for number in range(self.jobs):
            body = json.dumps(job_request(self.model, f"What is ticket {number}?")).encode()
            head = (
                "POST /v1/jobs HTTP/1.1\r\n"
                f"Host: 127.0.0.1:{self.port}\r\n"
                "Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            yield head.encode() + body


@dataclass(frozen=True)
class Accepted:
    """The result of an order, as its client saw it."""

    wall_s: float
    jobs: int
    p50_ms: float
    p99_ms: float
    client_cpu_s: float
    errors: dict[str, int] = field(default_factory=dict)

    @classmethod
    def decode(cls, line: str) -> Self:
        return cls(**json.loads(line))

    @property
    def jobs_per_s(self) -> float:
        return self.jobs / self.wall_s


def job_request(model: str, question: str, **options: object) -> dict[str, object]:
    """The body of POST /v1/jobs: a chat completion, with these options."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "max_tokens": 64} | options
    return {"endpoint": "/v1/chat/completions", "body": body}


async def submit(order: Order) -> Accepted:
    """Submits all jobs of the order."""
    requests = iter(list(order.http_requests()))
    took_s: list[float] = []
    errors: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(Connection, "127.0.0.1", order.port))[1]
        for _ in range(order.clients)
    ]
    gc.freeze()
    gc.disable()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(_drive(one, requests, took_s, errors) for one in connections))
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    if missing := order.jobs - len(took_s) - errors.total():
        errors["no answer"] = missing
    p50_ms, p99_ms = percentile_ms(took_s, 50), percentile_ms(took_s, 99)
    return Accepted(wall_s, len(took_s), p50_ms, p99_ms, cpu_s, dict(errors))


async def _drive(
    connection: Connection, requests: Iterator[bytes], took_s: list[float], errors: Counter[str]
) -> None:
    """One client: sends the next request when it has the answer to the last one."""
    for request in requests:
        reply = await connection.ask(request)
        if reply.status == 202 and reply.is_complete:
            took_s.append(time.perf_counter() - reply.asked_at_s)
        else:
            errors[f"status {reply.status}: {reply.text[:200]!r}"] += 1
        if not connection.is_open:
            return
    connection.close()


if __name__ == "__main__":
    order = Order(**json.loads(sys.stdin.readline()))
    print(json.dumps(asdict(uvloop.run(submit(order)))))
