"""`sluice bench --sweep`: the knee of known figures and of a deployment; two sweeps compared."""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pytest

from bench.baseline import BaselineError, Run
from bench.measurement import Load, Measurement, Percentiles
from bench.stack import Stack, running
from bench.sweep import Sweep, compare, ladder
from tests.test_client import command

SLOTS = 4
# An answer of 8 tokens takes 0.75 s in the engine, whatever the machine does beside it: what that
# adds to a request may be 0.3 s until the knee is elsewhere.
SLOTTED = {
    "name": "sim",
    "engine": "sim",
    "args": {"tokens-per-s": 10, "first-token-s": 0.05, "max-num-seqs": SLOTS},
}
OPTIONS = (
    *("--streams=16", "--requests=8", "--max-tokens=8", "--rounds=1"),
    # Four at a time wait for nobody; of sixteen most wait for twelve others.
    *("--sla-ttft-ms=800", "--sla-tpot-ms=1000"),
)
ANY = "--max-regression-percent=100000"
PNG = b"\x89PNG\r\n\x1a\n"


def measurement(rate: int, within: int, ttft_ms: float) -> Measurement:
    times = Percentiles(ttft_ms, ttft_ms, ttft_ms)
    return Measurement(
        wall_s=1,
        completed=rate,
        tokens=rate,
        ttft_ms=times,
        tpot_ms=times,
        gap_ms=times,
        end_to_end_ms=times,
        client_cpu_s=0,
        errors={},
        within_sla=within,
    )


def sweep(figures: Mapping[int, tuple[int, int, float]]) -> Sweep:
    """By streams: requests/s, those within the SLA, and the TTFT."""
    levels = [
        Run.of(Load("http://127.0.0.1", "m", streams, rate), [measurement(rate, within, ttft_ms)])
        for streams, (rate, within, ttft_ms) in figures.items()
    ]
    return Sweep(sla_ttft_ms=1000, sla_tpot_ms=100, levels=levels)


SATURATED = {
    1: (10, 10, 20.0),
    2: (20, 20, 20.0),
    4: (38, 38, 30.0),
    8: (42, 40, 90.0),
    16: (43, 5, 1400.0),
}


@pytest.mark.parametrize(
    ("most", "levels"), [(1, [1]), (2, [1, 2]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])]
)
def test_streams_double_up_to_the_most(most: int, levels: list[int]) -> None:
    assert ladder(most) == levels


def test_the_knee_is_where_more_streams_bring_little_but_waiting() -> None:
    measured = sweep(SATURATED)
    assert measured.knee.streams == 4
    knee, best = measured.describe()
    assert knee == (
        "the knee is at 4 streams: 38.0 requests/s, 38.0 within the SLA, TTFT p95 30.0 ms"
    )
    assert best == "the goodput is highest at 8 streams: 40.0 requests/s"


def test_a_knee_that_was_not_reached_is_no_knee() -> None:
    measured = sweep({streams: (10 * streams, 0, 20.0) for streams in (1, 2, 4)})
    assert measured.describe()[-1].endswith("raise --streams")


def test_two_sweeps_are_compared_at_the_knee_of_the_first() -> None:
    slower = {streams: (rate // 2, 10, 2 * ms) for streams, (rate, _, ms) in SATURATED.items()}
    changes = {change.figure: change.percent for change in compare(sweep(SATURATED), sweep(slower))}
    assert changes == pytest.approx(
        {
            "throughput at 4 streams": 50,
            "goodput at 4 streams": 100 * 28 / 38,
            "TTFT p95 at 4 streams": 100,
            "highest goodput": 100 * 30 / 40,
        }
    )
    better = compare(sweep(slower), sweep(SATURATED))
    assert all(change.percent < 0 for change in better)


def test_a_sweep_of_another_sla_is_refused() -> None:
    other = Load("u", "m", 16, 1, sla_ttft_ms=500, sla_tpot_ms=100)
    with pytest.raises(BaselineError, match="sla_ttft_ms 1000, not 500"):
        sweep(SATURATED).refuse_other(other)


@pytest.fixture(scope="module")
def slotted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A deployment whose engine answers four requests at a time."""
    with running(Stack(tmp_path_factory.mktemp("slotted"), [SLOTTED])) as stack:
        yield stack


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sweep of that deployment is."""
    return tmp_path_factory.mktemp("sweep")


def bench(stack: Stack, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    run = command(stack, "bench", *OPTIONS, *map(str, arguments))
    run["env"] |= env
    return subprocess.run(**run, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def swept(slotted: Stack, figures: Path) -> str:
    """What a sweep prints; its page is curve.html, what is saved before.json."""
    done = bench(slotted, "--sweep", figures / "curve.html", "--save", figures / "before.json")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_knee_of_a_deployment_is_at_its_slots(swept: str, figures: Path) -> None:
    head, columns, *rows = swept.splitlines()
    assert "TTFT within 800 ms, TPOT within 1000 ms" in head
    assert columns.split()[:3] == ["streams", "requests/s", "goodput"]
    assert [int(row.split()[0]) for row in rows[:5]] == [1, 2, 4, 8, 16]
    assert rows[5].startswith(f"the knee is at {SLOTS} streams: ")
    saved = orjson.loads((figures / "before.json").read_bytes())
    assert saved["knee_streams"] == SLOTS
    goodput = {level["streams"]: level["goodput"]["median"] for level in saved["levels"]}
    rates = {level["streams"]: level["requests_per_s"]["median"] for level in saved["levels"]}
    assert goodput[SLOTS] > rates[SLOTS] / 2
    assert goodput[16] < rates[16] / 2


class Links(HTMLParser):
    """What a page wants to load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]


def test_the_page_holds_all_that_it_shows(swept: str, figures: Path) -> None:
    assert (figures / "curve.png").read_bytes().startswith(PNG)
    page = (figures / "curve.html").read_text()
    links = Links(page)
    assert [link[:22] for link in links.found] == ["data:image/png;base64,"]
    assert not {"script", "link", "iframe"} & links.tags
    assert not re.search(r"@import|url\(", page)
    assert f"the knee is at {SLOTS} streams" in page
    assert page.count("<tr") == 6


def test_a_model_that_got_worse_fails_the_comparison(
    slotted: Stack, swept: str, figures: Path
) -> None:
    before = orjson.loads((figures / "before.json").read_bytes())
    for level in before["levels"]:
        for one in level["rounds"]:
            one["wall_s"] /= 10
            one["ttft_ms"]["p95"] /= 1000
    faster = figures / "faster.json"
    faster.write_bytes(orjson.dumps(before))
    page, saved = figures / "worse.html", figures / "worse.json"
    done = bench(slotted, "--sweep", page, "--baseline", faster, "--save", saved)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("sluice: ")]
    rate, good, wait, best = lines
    assert rate.startswith(f"sluice: throughput at {SLOTS} streams is ")
    assert good.startswith(f"sluice: goodput at {SLOTS} streams is ")
    assert wait.startswith(f"sluice: TTFT p95 at {SLOTS} streams is ")
    assert best.startswith("sluice: highest goodput is ")
    assert f" % worse than in {faster}; 10 % are allowed" in wait
    assert not saved.exists()
    assert f"throughput at {SLOTS} streams: " in page.read_text()


def test_the_same_again_passes(slotted: Stack, swept: str, figures: Path) -> None:
    again = ("--sweep", figures / "again.html", "--baseline", figures / "before.json", ANY)
    done = bench(slotted, *again, "--json")
    assert done.returncode == 0, done.stderr
    measured = orjson.loads(done.stdout)
    assert measured["knee_streams"] == SLOTS
    assert [change["unit"] for change in measured["changes"]] == [
        *("requests/s", "requests/s"),
        *("ms", "requests/s"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--streams=8", "--baseline={before}"), "streams 16, not 8"),
        (("--sla-ttft-ms=5", "--baseline={before}"), "sla_ttft_ms 800, not 5"),
        (("--baseline={run}",), "is no run of `sluice bench --sweep`; --save writes one"),
        (("--sweep={home}/curve.png",), "must end with .html"),
        (("--sweep={home}/missing/curve.html",), "--sweep: no file can be made in"),
    ],
)
def test_what_cannot_be_drawn_or_compared_is_refused_first(
    slotted: Stack, swept: str, figures: Path, home: Path, arguments: tuple[str, ...], message: str
) -> None:
    (home / "run.json").write_text("{}")
    places = {"before": figures / "before.json", "run": home / "run.json", "home": home}
    given = [argument.format(**places) for argument in arguments]
    done = bench(slotted, "--sweep", home / "curve.html", *given)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_was_measured_before_an_error_is_drawn_and_not_saved(home: Path) -> None:
    page, saved = home / "curve.html", home / "after.json"
    (place := home / "full").mkdir()
    with running(Stack(place, [SLOTTED], max_backlog=8)) as stack:
        # A slow API passes on sixteen at the engine's pace, and a few more: never sixty-four.
        done = bench(stack, "--sweep", page, "--save", saved, "--streams=64")
    assert done.returncode == 1
    ended = re.search(r"sluice: at (16|32|64) streams: ", done.stderr)
    assert ended, done.stderr
    assert f"the sweep ended early: at {ended[1]} streams: " in " ".join(done.stdout.split())
    assert "<td>8</td>" in page.read_text()
    assert f"<td>{ended[1]}</td>" not in page.read_text()
    assert not saved.exists()


def test_an_error_at_once_ends_a_sweep_and_nothing_is_drawn(slotted: Stack, home: Path) -> None:
    page = home / "curve.html"
    done = bench(slotted, "--sweep", page, "--model=unknown")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sluice: ")]
    assert line.startswith("sluice: at 1 stream: ")
    assert "x status 404" in line
    assert not page.exists()


def test_without_matplotlib_a_sweep_says_what_to_install(slotted: Stack, home: Path) -> None:
    missing = "raise ModuleNotFoundError('none here', name='matplotlib')"
    (home / "matplotlib.py").write_text(missing)
    path = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
    done = bench(slotted, "--sweep", home / "curve.html", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--sweep draws with matplotlib, which is not installed" in done.stderr
    assert "`load`" in done.stderr
