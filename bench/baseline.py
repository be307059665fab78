"""A run of `sluice bench`: as it is kept in a file, and beside another one."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import orjson
from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from bench.measurement import Load, Measurement
from bench.spread import Spread
from tasks.contract.errors import SluiceError
from tasks.contract.settings import without_password

TIMES = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "gap": "gap_ms", "end to end": "end_to_end_ms"}
PERCENTILES = ("p50", "p95", "p99")
COMPARED = ("TTFT", "TPOT")
# What two runs have to share: the other fields of a load make no answer slower.
TERMS = ("model", "streams", "max_tokens")


class BaselineError(SluiceError):
    """The run cannot be compared with that baseline."""


class Run(BaseModel):
    """What was measured, and with what."""

    date: AwareDatetime
    sluice_version: str
    url: str
    model: str
    streams: int
    requests: int  # of each round
    max_tokens: int
    rounds: list[Measurement] = Field(min_length=1)

    @classmethod
    def of(cls, load: Load, rounds: list[Measurement]) -> Self:
        """The run that has just ended."""
        return cls(
            date=datetime.now(UTC),
            sluice_version=version("sluice"),
            url=without_password(load.url),
            model=load.model,
            streams=load.streams,
            requests=load.requests,
            max_tokens=load.max_tokens,
            rounds=rounds,
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """The run in the file.

        Raises:
            BaselineError: the file holds none.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError:
            raise BaselineError(f"{path} is no run of `sluice bench`; --save writes one") from None

    def refuse_other(self, load: Load) -> None:
        """Raises a BaselineError if the load is not the one that this was measured with."""
        differences = [
            f"{name} {then}, not {now}"
            for name in TERMS
            if (then := getattr(self, name)) != (now := getattr(load, name))
        ]
        if differences:
            raise BaselineError(
                f"the baseline was measured with {' and '.join(differences)}; measure with the "
                "same, or save a new baseline"
            )

    def errors(self) -> Counter[str]:
        """What went wrong, how often."""
        return sum((Counter(one.errors) for one in self.rounds), Counter())

    def spread(self, figure: Callable[[Measurement], float]) -> Spread:
        return Spread.of([figure(one) for one in self.rounds])

    def latency_ms(self, time: str, percentile: str) -> Spread:
        """One of TIMES, one of PERCENTILES."""
        return self.spread(lambda seen: getattr(getattr(seen, TIMES[time]), percentile))

    def as_json(self) -> dict[str, Any]:
        """The run, with the figures of all its rounds."""
        return self.model_dump(mode="json") | {
            "requests_per_s": self.spread(lambda seen: seen.requests_per_s),
            "goodput": self.spread(lambda seen: seen.goodput),
            "tokens_per_s": self.spread(lambda seen: seen.tokens_per_s),
            "latency": {
                field: {percentile: self.latency_ms(time, percentile) for percentile in PERCENTILES}
                for time, field in TIMES.items()
            },
        }

    def save(self, path: Path) -> None:
        path.write_bytes(orjson.dumps(self.as_json(), option=orjson.OPT_INDENT_2))


@dataclass(frozen=True)
class Change:
    """A figure of a run beside the baseline's."""

    figure: str
    unit: str
    before: Spread
    now: Spread
    is_rate: bool = False  # more is better; of a time, less is

    @property
    def percent(self) -> float:
        """By how much the median of the rounds is worse; negative if it is better."""
        growth = self._growth_percent
        return -growth if self.is_rate else growth

    @property
    def _growth_percent(self) -> float:
        before, now = self.before.median, self.now.median
        if before:
            return 100 * (now / before - 1)
        # A rate of nothing cannot fall.
        return 0 if self.is_rate else math.inf

    def is_worse(self, most_percent: float) -> bool:
        """Whether by more than that; so is what could not be measured."""
        return not self.percent <= most_percent

    def __str__(self) -> str:
        growth = f"{self._growth_percent:+.1f} %"
        return f"{self.figure}: {self.before} -> {self.now} {self.unit}, {growth}"


def compare(baseline: Run, run: Run) -> list[Change]:
    """The p95 of what users feel: the wait for the first token, and the time of each other one."""
    return [
        Change(f"{time} p95", "ms", baseline.latency_ms(time, "p95"), run.latency_ms(time, "p95"))
        for time in COMPARED
    ]
