"""Rounds of load on running stacks: what the client saw, and which process paid for it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.drive import run_client
from bench.measurement import Load, Measurement
from bench.processes import cpu_between_s
from bench.spread import Spread
from bench.stacks import Stack, StackError

REQUESTS = {1: 40, 16: 240, 64: 640}  # by concurrent streams: each about 8 s on two cores
SETTLE_S = 1.0  # vLLM's processes spin for a moment after their last request


@dataclass(frozen=True)
class Round:
    """One round of one stack."""

    number: int  # 0 is the warm-up, which counts for nothing but errors
    stack: str
    streams: int
    measurement: Measurement
    cpu_s: dict[str, float]  # by role, the client included
    idle_percent: float  # of one core, used by the other stacks meanwhile

    @property
    def cpu_s_per_1000_tokens(self) -> dict[str, float]:
        thousands = self.measurement.tokens / 1000 or math.nan
        return {role: used / thousands for role, used in self.cpu_s.items()}

    def as_json(self) -> dict[str, Any]:
        seen = self.measurement
        return asdict(self) | {
            "requests_per_s": seen.requests_per_s,
            "tokens_per_s": seen.tokens_per_s,
            "cpu_s_per_1000_tokens": self.cpu_s_per_1000_tokens,
        }


def run_round(number: int, stack: Stack, others: Sequence[Stack], load: Load) -> Round:
    """One round on the stack, while the others stand idle."""
    time.sleep(SETTLE_S)
    start_s = time.monotonic()
    before, others_before = stack.snapshot(), [other.snapshot() for other in others]
    seen = run_client(load)
    cpu_s = cpu_between_s(before, stack.snapshot()) | {"client": seen.client_cpu_s}
    idle_s = sum(
        sum(cpu_between_s(earlier, other.snapshot()).values())
        for other, earlier in zip(others, others_before, strict=True)
    )
    idle_percent = 100 * idle_s / (time.monotonic() - start_s)
    return Round(number, stack.name, load.streams, seen, cpu_s, idle_percent)


def compare(
    stacks: Sequence[Stack], model: str, rounds: int, scale: float, progress: Callable[[str], None]
) -> list[Round]:
    """A warm-up round, then the counted rounds, of every level and stack in turn.

    Raises:
        StackError: a stack answered no request of a round.
    """
    done = []
    for number in range(rounds + 1):
        for streams, requests in REQUESTS.items():
            for stack in stacks:
                name = f"round {number} of {rounds}" if number else "warm-up"
                progress(f"{name}: {stack.name}, {streams} streams")
                count = max(round(requests * scale), streams)
                # Another seed per round; the same for all stacks.
                load = Load(stack.url, model, streams, count, seed=number)
                others = [other for other in stacks if other is not stack]
                result = run_round(number, stack, others, load)
                if not result.measurement.completed:
                    raise StackError(f"{stack.name} answers nothing: {result.measurement.errors}")
                done.append(result)
    return done


def of(rounds: Sequence[Round], stack: str, streams: int) -> list[Round]:
    """The counted rounds of that stack and level, in their order."""
    return [r for r in rounds if (r.stack, r.streams) == (stack, streams) and r.number]


def pairwise(
    rounds: Sequence[Round],
    streams: int,
    figure: Callable[[Measurement], float],
    relate: Callable[[float, float], float],
) -> Spread:
    """How Sluice's figure relates to vLLM's of the same round, over the rounds."""
    pairs = zip(of(rounds, "Sluice", streams), of(rounds, "vLLM", streams), strict=True)
    related = [relate(figure(a.measurement), figure(b.measurement)) for a, b in pairs]
    return Spread.of(related)
