"""Repeats the tests of the suite, and reports at the end the faults and their effects."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import pytest

from bench.stack import Stack, running
from tests.conftest import SIM

LEASE_S = 3.0
# Between the reaper's rounds, and the moment that a claim takes.
REAP_S = 2.0
SLOW_SIM = SIM | {"args": {"tokens-per-s": 25, "first-token-s": 0.05}}


@dataclass
class Fault:
    """The faults of one test, how often, and their effects."""

    test: str
    rounds: int = 0
    inflicted: list[str] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    tokens: int = 0
    """Tokens that clients received, each compared with an undisturbed run."""

    def inflict(self, what: str) -> None:
        self.inflicted.append(what)

    def add(self, other: "Fault") -> None:
        self.rounds += other.rounds
        self.inflicted += other.inflicted
        self.recovery_s += other.recovery_s
        self.tokens += other.tokens

    def row(self) -> str:
        what = ", ".join(f"{n} {w}" for w, n in _counted(self.inflicted))
        p50, most = (
            (f"{median(self.recovery_s):.1f} s", f"{max(self.recovery_s):.1f} s")
            if self.recovery_s
            else ("", "")
        )
        return f"{self.test:66} {self.rounds:>6} {p50:>7} {most:>7} {self.tokens:>8}  {what}"


def _counted(names: list[str]) -> list[tuple[str, int]]:
    return [(name, names.count(name)) for name in dict.fromkeys(names)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault" in metafunc.fixturenames:
        metafunc.fixturenames.append("round_number")
        rounds = range(metafunc.config.getoption("repeat"))
        metafunc.parametrize("round_number", rounds, ids=[f"round{n}" for n in rounds])


@pytest.fixture
def fault(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Iterator[Fault]:
    """The record of a test's faults."""
    fault = Fault(str(request.node.originalname).removeprefix("test_"), rounds=1)
    yield fault
    record_property("fault", asdict(fault))


# Reports come from the processes that run the tests to the one that prints them.
_FAULTS: dict[str, Fault] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    noted = dict(report.user_properties).get("fault")
    if report.when == "teardown" and isinstance(noted, dict):
        fault = Fault(**noted)
        _FAULTS.setdefault(fault.test, Fault(fault.test)).add(fault)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _FAULTS:
        return
    terminalreporter.section("faults")
    head = f"{'':66} {'rounds':>6} {'p50':>7} {'max':>7} {'tokens':>8}  inflicted"
    terminalreporter.write_line(head)
    for each in _FAULTS.values():
        terminalreporter.write_line(each.row())
    terminalreporter.write_line(
        "p50, max: from the fault to the next token, or to the answer; "
        "tokens: received by clients and equal to an undisturbed run"
    )


@pytest.fixture
def stack(home: Path, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """API, maintenance and one slow worker; leases at their shortest, unless a test sets them."""
    settings = {"lease_s": LEASE_S, "keep_alive_s": 1} | getattr(request, "param", {})
    with running(Stack(home, [SLOW_SIM], **settings)) as stack:
        yield stack


@pytest.fixture
def two_workers(home: Path) -> Iterator[Stack]:
    """The same with two workers."""
    with running(Stack(home, [SLOW_SIM], lease_s=LEASE_S, keep_alive_s=1), 2) as stack:
        yield stack
