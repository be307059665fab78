"""10,000 streams of a token a second, open at once on one API process: memory, and first tokens."""

from pathlib import Path

from bench.drive import run_client
from bench.figures import Report
from bench.measurement import Load
from bench.processes import cpu_between_s, largest_rss_mb, snapshot
from bench.stack import Stack, running

STREAMS = 10_000  # as many as an API process serves (api/connection_limits.py)
RAMP_S = 80  # all have come by then, and none has ended
TOKENS = 100
WORKERS, SLOTS = 4, 2600
STALL_S = RAMP_S + TOKENS + 60
MODEL = {
    "name": "sim",
    "engine": "sim",
    "slots": SLOTS,
    "args": {"tokens-per-s": 1, "first-token-s": 0, "max-num-seqs": SLOTS},
}


def measure(report: Report, home: Path, scale: float) -> None:
    """Opens the streams evenly, and has the largest memory of the API process on the way."""
    streams = max(round(STREAMS * scale), 1)
    stack = Stack(home, [MODEL], bus_url="", database_url="", model="")
    with running(stack, WORKERS):
        api = stack.api_processes[0].pid
        before = snapshot(api)
        rss_mb = [largest_rss_mb(before, "api")]
        report.console.print(f"{streams} slow streams")
        load = Load(
            stack.url,
            "sim",
            streams,
            streams,
            max_tokens=TOKENS,
            per_s=streams / RAMP_S,
            stall_s=STALL_S,
        )
        seen = run_client(load, lambda _: rss_mb.append(largest_rss_mb(snapshot(api), "api")))
        cpu_s = cpu_between_s(before, snapshot(api))["api"]
    name = f"{streams} slow streams: "
    report.errors += [name + f"{count} x {what}" for what, count in seen.errors.items()]
    each_kb = 1000 * (max(rss_mb) - rss_mb[0]) / streams
    report.add(name + "memory of each", "kB", [each_kb], at_most=40)
    report.add(name + "TTFT p99", "ms", [seen.ttft_ms.p99], at_most=250)
    report.add(name + "TTFT p50", "ms", [seen.ttft_ms.p50])
    report.add(name + "CPU of the API", "% of a core", [100 * cpu_s / seen.wall_s])
    report.notes.append(
        f"{name}the API used {rss_mb[0]:.0f} MB before; TPOT p50 {seen.tpot_ms.p50:.0f} ms"
    )
