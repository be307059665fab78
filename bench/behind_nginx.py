"""What nginx with TLS adds to the time between tokens: one API, asked through it and directly.

The engine is simulated, both ways are asked in turns, and another way begins in each round.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from bench.drive import run_client
from bench.figures import Report
from bench.measurement import Load, Measurement
from bench.nginx import Nginx
from bench.stack import Stack, running
from deploy import make_secrets

TOKENS_PER_S = 50
MODEL = {
    "name": "sim",
    "engine": "sim",
    "slots": 64,
    "args": {"tokens-per-s": TOKENS_PER_S, "first-token-s": 0.01},
}
AT_MOST_MS = 2.0
DIRECT, BEHIND = "directly", "through nginx"


def run(console: Console, rounds: int, streams: int, requests: int) -> list[str]:
    """Runs and prints the comparison; returns what went wrong."""
    seen: dict[str, list[Measurement]] = {DIRECT: [], BEHIND: []}
    with TemporaryDirectory(prefix="sluice-bench-nginx-") as directory:
        home = Path(directory)
        make_secrets.main("localhost", home)
        # The load client trusts it.
        os.environ["SSL_CERT_FILE"] = str(home / "secrets" / "ca")
        with (
            running(Stack(home, [MODEL])) as stack,
            Nginx(home, home / "secrets", stack.api_ports) as nginx,
        ):
            urls = {DIRECT: stack.url, BEHIND: nginx.url}
            for number in range(rounds + 1):
                console.print(f"round {number} of {rounds}")
                for way in (DIRECT, BEHIND) if number % 2 else (BEHIND, DIRECT):
                    load = Load(urls[way], "sim", streams, requests, seed=number)
                    seen[way].append(run_client(load))
    return _report(console, {way: measured[1:] for way, measured in seen.items()})


def _report(console: Console, seen: dict[str, list[Measurement]]) -> list[str]:
    report = Report(console)
    for way, rounds in seen.items():
        report.add(f"inter-token p99, {way}", "ms", [one.gap_ms.p99 for one in rounds])
        report.add(f"TTFT p99, {way}", "ms", [one.ttft_ms.p99 for one in rounds])
    pairs = list(zip(seen[BEHIND], seen[DIRECT], strict=True))
    more_ms = [behind.gap_ms.p99 - direct.gap_ms.p99 for behind, direct in pairs]
    report.add("inter-token p99, more through nginx", "ms", more_ms, at_most=AT_MOST_MS)
    report.show()
    return [
        f"{way}: {count} x {what}"
        for way, rounds in seen.items()
        for one in rounds
        for what, count in one.errors.items()
    ]
