"""A sweep of `sluice bench --sweep`: the same requests on more and more streams, and the knee."""

from pathlib import Path
from typing import Any, Self

import orjson
from pydantic import BaseModel, Field, ValidationError

from bench.baseline import BaselineError, Change, Run
from bench.measurement import Load
from bench.spread import Spread, short

REQUESTS_PER_STREAM = 4
SLA = ("sla_ttft_ms", "sla_tpot_ms")
COLUMNS = ("streams", "requests/s", "goodput", "tokens/s", "TTFT p95, ms", "TPOT p95, ms")


def ladder(most: int) -> list[int]:
    """The streams of each level: doubled, up to the most."""
    return [2**power for power in range((most - 1).bit_length())] + [most]


class Sweep(BaseModel):
    """Runs that differ in their streams, in the order of these."""

    sla_ttft_ms: float
    sla_tpot_ms: float
    levels: list[Run] = Field(min_length=1)
    failed: str = ""  # why the next level is missing

    @classmethod
    def read(cls, path: Path) -> Self:
        """The sweep in the file.

        Raises:
            BaselineError: the file holds none.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError:
            raise BaselineError(
                f"{path} is no run of `sluice bench --sweep`; --save writes one"
            ) from None

    def refuse_other(self, highest: Load) -> None:
        """Raises a BaselineError if that is not the highest level that this was measured with."""
        self.levels[-1].refuse_other(highest)
        for name in SLA:
            then, now = getattr(self, name), getattr(highest, name)
            if then != now:
                raise BaselineError(
                    f"the baseline was measured with {name} {then:g}, not {now:g}; measure with "
                    "the same, or save a new baseline"
                )

    @property
    def knee(self) -> Run:
        """The level of the most power, which is throughput / response time (Kleinrock).

        The response time of a closed loop is streams / throughput (Little's law).
        """
        return max(self.levels, key=lambda level: throughput(level).median ** 2 / level.streams)

    @property
    def best(self) -> Run:
        """The level of the highest goodput."""
        return max(self.levels, key=lambda level: goodput(level).median)

    def level(self, streams: int) -> Run:
        return next(level for level in self.levels if level.streams == streams)

    def describe(self) -> list[str]:
        """Where the knee is, and where the goodput is highest."""
        knee, best = self.knee, self.best
        within, most = short(goodput(knee).median), short(goodput(best).median)
        rate, ttft_ms = short(throughput(knee).median), short(ttft_p95_ms(knee).median)
        at_the_knee = f"{rate} requests/s, {within} within the SLA, TTFT p95 {ttft_ms} ms"
        sentences = [
            f"the knee is at {count(knee.streams)}: {at_the_knee}",
            f"the goodput is highest at {count(best.streams)}: {most} requests/s",
        ]
        if self.failed:
            sentences.append(f"the sweep ended early: {self.failed}")
        elif knee is self.levels[-1]:
            sentences.append("the knee may be higher than this sweep goes; raise --streams")
        return sentences

    def as_json(self) -> dict[str, Any]:
        """The sweep, with the figures of all its levels."""
        levels = [level.as_json() for level in self.levels]
        return self.model_dump(mode="json", exclude={"levels"}) | {
            "knee_streams": self.knee.streams,
            "levels": levels,
        }

    def save(self, path: Path) -> None:
        path.write_bytes(orjson.dumps(self.as_json(), option=orjson.OPT_INDENT_2))


def throughput(level: Run) -> Spread:
    """Requests per second."""
    return level.spread(lambda seen: seen.requests_per_s)


def goodput(level: Run) -> Spread:
    """Requests per second within the SLA."""
    return level.spread(lambda seen: seen.goodput)


def ttft_p95_ms(level: Run) -> Spread:
    return level.latency_ms("TTFT", "p95")


def cells(level: Run) -> list[str]:
    """What COLUMNS name."""
    tokens_per_s = level.spread(lambda seen: seen.tokens_per_s)
    tpot_p95_ms = level.latency_ms("TPOT", "p95")
    figures = throughput(level), goodput(level), tokens_per_s, ttft_p95_ms(level), tpot_p95_ms
    return [str(level.streams), *map(str, figures)]


def count(streams: int) -> str:
    return "1 stream" if streams == 1 else f"{streams} streams"


def compare(baseline: Sweep, sweep: Sweep) -> list[Change]:
    """What counts at the load that the baseline's knee is at, and the most that there is."""
    before = baseline.knee
    now, at = sweep.level(before.streams), f"at {count(before.streams)}"
    rate = "requests/s"
    return [
        Change(f"throughput {at}", rate, throughput(before), throughput(now), is_rate=True),
        Change(f"goodput {at}", rate, goodput(before), goodput(now), is_rate=True),
        Change(f"TTFT p95 {at}", "ms", ttft_p95_ms(before), ttft_p95_ms(now)),
        Change("highest goodput", rate, goodput(baseline.best), goodput(sweep.best), is_rate=True),
    ]
