"""Rounds of load on several stacks in turn, and what their figures are beside each other."""

import math
from collections.abc import Callable, Sequence

from bench.measurement import Load
from bench.peers.servers import ROLES
from bench.rounds import Round, run_round
from bench.stacks import Stack, StackError

Figure = Callable[[Round], float]


def take_turns(
    stacks: Sequence[Stack],
    rounds: int,
    compose: Callable[[Stack, int], Load],
    progress: Callable[[str], None],
) -> list[Round]:
    """A warm-up round, then the counted rounds; another stack begins in each.

    Raises:
        StackError: a stack answered no request of a round.
    """
    done = []
    for number in range(rounds + 1):
        first = number % len(stacks)
        for stack in (*stacks[first:], *stacks[:first]):
            one = run_round(number, stack, (), compose(stack, number))
            if not one.measurement.completed:
                raise StackError(f"{stack.name} answers nothing: {one.measurement.errors}")
            done.append(one)
            which = f"round {number} of {rounds}" if number else "warm-up"
            # A run may be cut short, and what it has seen by then is to count.
            progress(f"{which}: {stack.name}: {per_s(one):.1f} req/s, {_wrong(one)} errors")
    return done


def values(rounds: Sequence[Round], stack: str, figure: Figure) -> list[float]:
    """The figure of each counted round of the stack."""
    return [figure(one) for one in rounds if one.stack == stack and one.number]


def ratios(rounds: Sequence[Round], stack: str, other: str, figure: Figure) -> list[float]:
    """The stack's figure over the other one's of the same round."""
    pairs = zip(values(rounds, stack, figure), values(rounds, other, figure), strict=True)
    return [ours / theirs if theirs else math.nan for ours, theirs in pairs]


def errors(rounds: Sequence[Round]) -> list[str]:
    """What went wrong, the warm-up included."""
    return [
        f"{one.stack}, round {one.number}: {count} x {what}"
        for one in rounds
        for what, count in one.measurement.errors.items()
    ]


def _wrong(one: Round) -> int:
    return sum(one.measurement.errors.values())


def per_s(one: Round) -> float:
    """Requests a second."""
    return one.measurement.requests_per_s


def front_cpu_s(one: Round) -> float:
    """Processor time of the process that clients talk to."""
    return one.cpu_s.get(ROLES.get(one.stack, ""), 0.0) or math.nan


def requests_per_core_s(one: Round) -> float:
    """Requests in each second of that process's processor time."""
    return one.measurement.completed / front_cpu_s(one)


def chunks_per_core_s(one: Round) -> float:
    """Events with text in each second of that process's processor time."""
    return one.measurement.events / front_cpu_s(one)


def cpu_ms_per_request(one: Round) -> float:
    """Processor time of all its processes, the engine's server not among them."""
    return 1000 * _cpu_s(one) / one.measurement.completed


def cpu_ms_per_1000_chunks(one: Round) -> float:
    """The same for a thousand events with text."""
    return 1_000_000 * _cpu_s(one) / one.measurement.events


def _cpu_s(one: Round) -> float:
    return sum(s for role, s in one.cpu_s.items() if role != "client")
