"""The pictures in docs/ are what their scripts draw, of figures that the pages have."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs import charts, screens

DOCS = Path(__file__).parents[1] / "docs"


def test_the_pictures_are_what_their_scripts_draw() -> None:
    assert charts.FILE.read_text() == charts.chart(), "`make docs` draws it anew"
    assert screens.FILE.read_text() == screens.screen(), "`make docs` draws it anew"


def test_the_chart_has_the_figures_of_the_page() -> None:
    drawn = {
        (str(streams), server): figures
        for server, each in charts.FIGURES.items()
        for streams, figures in zip(charts.STREAMS, each, strict=True)
    }
    assert dict(measured()) == drawn


def test_the_peers_chart_has_the_figures_of_the_page() -> None:
    assert dict(measured_peers()) == charts.PEERS
    assert charts.PEERS_FILE.read_text() == charts.peers_chart(), "`make docs` draws it anew"


def measured_peers() -> Iterator[tuple[str, tuple[float | None, ...]]]:
    """Each server's row of the page's first table."""
    page, _, _ = (DOCS / "benchmarks.md").read_text().partition("\n## ")
    servers = "|".join(charts.PEER_COLORS)
    rows = re.findall(rf"^\| ({servers}) \| (.*) \|$", page, re.MULTILINE)
    assert [server for server, _ in rows] == list(charts.PEER_COLORS)
    for server, cells in rows:
        yield server, tuple(None if cell == "—" else float(cell) for cell in cells.split(" | "))


def measured() -> Iterator[tuple[tuple[str, str], tuple[float, ...]]]:
    """Streams and server, requests/s and TTFT p50 and p99, of each row of the page's table."""
    page = (DOCS / "performance.md").read_text()
    for row in re.findall(r"^\| (\d+ \| (?:vLLM|Sluice) \|.*) \|$", page, re.MULTILINE):
        streams, server, requests_per_s, _, p50, p99, *_ = row.split(" | ")
        yield (streams, server), tuple(map(float, (requests_per_s, p50, p99)))


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=lambda path: path.stem)
def test_a_picture_is_whole_and_loads_nothing(picture: Path) -> None:
    text = picture.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert not re.search(r"(?:href|src|url)\s*[=(]\s*[\"']?https?:", text)
