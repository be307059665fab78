"""Memory of Sluice's API process over many short requests, streamed and not."""

from rich.console import Console

from bench.drive import run_client
from bench.measurement import Load
from bench.processes import largest_rss_mb
from bench.stacks import Stack

STEPS = 10
REQUESTS_PER_STEP = 1000
STREAMS = 16


def run(
    stack: Stack, model: str, scale: float, console: Console
) -> tuple[dict[int, float], list[str]]:
    """Resident MB of the API's largest process by requests served, and what went wrong."""
    samples, errors = {0: largest_rss_mb(stack.snapshot(), "api")}, []
    count = round(REQUESTS_PER_STEP * scale)
    console.print(f"{0:6d} requests: {samples[0]:.1f} MB")
    for step in range(1, STEPS + 1):
        load = Load(stack.url, model, STREAMS, count, max_tokens=4, mixed=True, seed=step)
        seen = run_client(load)
        errors += [f"step {step}: {times} x {what}" for what, times in seen.errors.items()]
        samples[step * count] = largest_rss_mb(stack.snapshot(), "api")
        console.print(f"{step * count:6d} requests: {samples[step * count]:.1f} MB")
    return samples, errors
