"""Whatever happens, in whatever order: no accepted job is ever in nobody's hands."""

import random
import time
from collections.abc import Callable

import pytest
from hypothesis import Phase

from tests.model.conftest import Make
from tests.model.machine import QueueMachine, run


@pytest.mark.timeout(0)
def test_no_accepted_job_is_ever_in_nobodys_hands(
    make_world: Make, pytestconfig: pytest.Config, report: Callable[[str], None]
) -> None:
    steps: int = pytestconfig.getoption("steps")
    number = int(pytestconfig.getoption("hypothesis_seed") or random.randrange(2**32))
    report(f"again with --hypothesis-seed={number}")
    QueueMachine.done.clear()
    began_s = time.monotonic()
    with make_world({}) as world:
        QueueMachine.world = world
        while QueueMachine.done.total() < steps:
            run(steps - QueueMachine.done.total(), number, [Phase.generate])
            number += 1
    took_s = time.monotonic() - began_s
    done = QueueMachine.done
    report(
        f"{done.total()} steps in {took_s:.0f} s: "
        + ", ".join(f"{n} {r}" for r, n in done.most_common())
    )
