"""Draws docs/speed.svg: Sluice beside vLLM's own server, from the figures of performance.md.

`make docs` writes it. tests/test_pictures.py compares FIGURES with the table there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "speed.svg"


class Figures(NamedTuple):
    """One server at one number of streams."""

    requests_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float


STREAMS = (1, 16, 64)
FIGURES = {
    "vLLM": (Figures(3.2, 15.1, 256), Figures(23.0, 58.4, 85.4), Figures(40.1, 199, 285)),
    "Sluice": (Figures(2.9, 18.3, 78.4), Figures(23.0, 61.2, 304), Figures(38.2, 183, 423)),
}
PANELS = (
    "requests/s (more is better)",
    "TTFT p50, ms (less is better)",
    "TTFT p99, ms (less is better)",
)

WIDTH, HEIGHT = 840, 250
PANEL_WIDTH, GROUP_WIDTH, BAR_WIDTH = 280, 84, 34
TOP, BOTTOM, LEFT = 66, 204, 16
COLORS = {"vLLM": "#8b949e", "Sluice": "#1f6feb"}


def chart() -> str:
    """The picture."""
    return "\n".join([*_head(), *_legend(), *_bars(), "</svg>", ""])


def _head() -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#24292f">'
    )
    yield "<title>Sluice beside vLLM's own server at 1, 16 and 64 streams</title>"
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>'


def _legend() -> Iterator[str]:
    for number, (server, color) in enumerate(COLORS.items()):
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


def _bar(x: float, value: float, most: float, color: str) -> Iterator[str]:
    height = round((BOTTOM - TOP - 16) * value / most, 1)
    place = f'x="{x}" y="{BOTTOM - height}" width="{BAR_WIDTH - 3}" height="{height}"'
    yield f'<rect {place} fill="{color}"/>'
    yield _text(x + (BAR_WIDTH - 3) / 2, BOTTOM - height - 4, f"{value:g}", 11)


def _text(x: float, y: float, text: str, size: int = 13) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle">{text}</text>'


if __name__ == "__main__":
    FILE.write_text(chart())
