"""Draws docs/speed.svg: Sluice beside vLLM's own server, from the figures of performance.md.

And docs/peers.svg: Sluice beside its peers, from those of benchmarks.md. `make docs` writes them.
tests/test_pictures.py compares FIGURES and PEERS with the tables there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "speed.svg"
PEERS_FILE = Path(__file__).parent / "peers.svg"


class Figures(NamedTuple):
    """One server at one number of streams."""

    requests_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float


STREAMS = (1, 16, 64)
FIGURES = {
    "vLLM": (Figures(2.0, 19.9, 248), Figures(17.7, 53.3, 140), Figures(25.3, 178, 376)),
    "Sluice": (Figures(2.1, 24.6, 40.4), Figures(15.2, 70.0, 303), Figures(27.1, 210, 526)),
}
PANELS = (
    "requests/s (more is better)",
    "TTFT p50, ms (less is better)",
    "TTFT p99, ms (less is better)",
)

# By server, a figure of each panel; None: there is none.
PEERS: dict[str, tuple[float | None, ...]] = {
    "vLLM": (15.1, None, None, 0),
    "Sluice": (15.1, 7765, 315, 32),
    "LiteLLM": (5.45, 644, 47.2, 16),
    "vLLM router": (14.1, 18004, 4348, 16),
}
PEER_PANELS = (
    "requests/s, 64 streams",
    "chunks/s per core, relayed",
    "requests/s per core, whole",
    "of 32 whole after kill -9",
)

WIDTH, HEIGHT = 840, 250
PANEL_WIDTH, GROUP_WIDTH, BAR_WIDTH = 280, 84, 34
TOP, BOTTOM, LEFT = 66, 204, 16
PEER_PANEL_WIDTH = 208
COLORS = {"vLLM": "#8b949e", "Sluice": "#1f6feb"}
PEER_COLORS = COLORS | {"LiteLLM": "#bf8700", "vLLM router": "#1a7f37"}


def chart() -> str:
    """The picture of Sluice beside vLLM's own server."""
    title = "Sluice beside vLLM's own server at 1, 16 and 64 streams"
    return "\n".join([*_head(title), *_legend(COLORS), *_bars(), "</svg>", ""])


def peers_chart() -> str:
    """The picture of Sluice beside its peers: more is better in each panel."""
    title = "Sluice beside vLLM's own server, LiteLLM and vLLM's router"
    return "\n".join([*_head(title), *_legend(PEER_COLORS), *_peer_bars(), "</svg>", ""])


def _head(title: str) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#24292f">'
    )
    yield f"<title>{title}</title>"
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>'


def _legend(colors: dict[str, str]) -> Iterator[str]:
    for number, (server, color) in enumerate(colors.items()):
        x = LEFT + 90 * number
        yield f'<rect x="{x}" y="12" width="12" height="12" fill="{color}"/>'
        yield f'<text x="{x + 18}" y="23">{server}</text>'


def _bars() -> Iterator[str]:
    for panel, title in enumerate(PANELS):
        left = LEFT + PANEL_WIDTH * panel
        most = max(figures[panel] for each in FIGURES.values() for figures in each)
        yield f'<text x="{left}" y="48" font-weight="bold">{title}</text>'
        for group, streams in enumerate(STREAMS):
            x = left + GROUP_WIDTH * group
            for bar, (server, figures) in enumerate(FIGURES.items()):
                yield from _bar(x + bar * BAR_WIDTH, figures[group][panel], most, COLORS[server])
            yield _text(x + BAR_WIDTH, BOTTOM + 18, f"{streams}")
        yield _text(left + 1.4 * GROUP_WIDTH, BOTTOM + 36, "streams")


def _peer_bars() -> Iterator[str]:
    for panel, title in enumerate(PEER_PANELS):
        left = LEFT + PEER_PANEL_WIDTH * panel
        figures = {server: each[panel] for server, each in PEERS.items()}
        most = max(figure for figure in figures.values() if figure is not None)
        yield f'<text x="{left}" y="48" font-weight="bold">{title}</text>'
        for bar, (server, figure) in enumerate(figures.items()):
            if figure is not None:
                yield from _bar(left + bar * BAR_WIDTH, figure, most, PEER_COLORS[server])


def _bar(x: float, value: float, most: float, color: str) -> Iterator[str]:
    height = round((BOTTOM - TOP - 16) * value / most, 1)
    place = f'x="{x}" y="{BOTTOM - height}" width="{BAR_WIDTH - 3}" height="{height}"'
    yield f'<rect {place} fill="{color}"/>'
    yield _text(x + (BAR_WIDTH - 3) / 2, BOTTOM - height - 4, f"{value:g}", 11)


def _text(x: float, y: float, text: str, size: int = 13) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle">{text}</text>'


if __name__ == "__main__":
    FILE.write_text(chart())
    PEERS_FILE.write_text(peers_chart())
