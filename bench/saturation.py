"""The saturation curve of a sweep, as a picture and as a page that holds it. Needs matplotlib."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.baseline import Change, Run
from bench.spread import Spread
from bench.sweep import COLUMNS, Sweep, cells, goodput, throughput, ttft_p95_ms

COLORS = {"throughput": "#1f6feb", "goodput": "#1a7f37", "TTFT p95": "#bf3989"}
STYLE = """\
body { font: 15px/1.5 sans-serif; color: #24292f; max-width: 60em; margin: 2em auto; }
img { max-width: 100%; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 0.3em 1em; text-align: right; border-bottom: 1px solid #d0d7de; }
tr.knee { background: #ddf4ff; }"""


def picture(sweep: Sweep, baseline: Sweep | None) -> bytes:
    """A PNG: throughput and goodput above, TTFT p95 below; the baseline is dashed."""
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    rates, waits = figure.subplots(2, 1, sharex=True)
    for one, suffix, line in ((sweep, "", "-"), (baseline, ", baseline", "--")):
        if one:
            _plot(rates, one, throughput, f"throughput{suffix}", line)
            _plot(rates, one, goodput, f"goodput{suffix}", line)
            _plot(waits, one, ttft_p95_ms, f"TTFT p95{suffix}", line)
    waits.axhline(sweep.sla_ttft_ms, color="#57606a", linestyle=":", label="SLA")
    for axes in (rates, waits):
        axes.axvline(sweep.knee.streams, color="#57606a", linewidth=0.8, label="knee")
        axes.grid(alpha=0.3)
        axes.legend()
    rates.set_title(f"{sweep.levels[0].model}: {sweep.levels[0].max_tokens} tokens an answer")
    rates.set_ylabel("requests/s")
    rates.set_ylim(bottom=0)
    waits.set_ylabel("TTFT p95, ms")
    waits.set_yscale("log")
    waits.set_xlabel("streams")
    waits.set_xscale("log", base=2)
    streams = [level.streams for level in sweep.levels]
    waits.set_xticks(streams, [str(number) for number in streams])
    waits.set_xticks([], minor=True)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _plot(axes: Axes, sweep: Sweep, figure: Callable[[Run], Spread], label: str, line: str) -> None:
    """The medians of the rounds; the lowest and the highest as a band."""
    streams = [level.streams for level in sweep.levels]
    spreads = [figure(level) for level in sweep.levels]
    color = COLORS[label.partition(",")[0]]
    medians = [spread.median for spread in spreads]
    axes.plot(streams, medians, line, marker="o", markersize=4, color=color, label=label)
    lows, highs = [spread.low for spread in spreads], [spread.high for spread in spreads]
    axes.fill_between(streams, lows, highs, color=color, alpha=0.12)


def page(sweep: Sweep, changes: Sequence[Change], png: bytes) -> str:
    """HTML that loads nothing: the picture is in it."""
    first = sweep.levels[0]
    title = f"{escape(first.model)} at {escape(first.url)}"
    sentences = [*sweep.describe(), *map(str, changes)]
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = "\n".join(_row(level, is_knee=level is sweep.knee) for level in sweep.levels)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>
{STYLE}
</style></head>
<body>
<h1>{title}</h1>
<p>{first.date:%d %B %Y}, Sluice {escape(first.sluice_version)}; rounds of each level:
{len(first.rounds)}; tokens of each answer: {first.max_tokens}.
SLA: TTFT {sweep.sla_ttft_ms:g} ms, TPOT {sweep.sla_tpot_ms:g} ms.</p>
<img alt="The saturation curve" src="data:image/png;base64,{b64encode(png).decode()}">
<ul>
{items}
</ul>
<table>
<tr>{head}</tr>
{rows}
</table>
</body>
</html>
"""


def _row(level: Run, *, is_knee: bool) -> str:
    columns = "".join(f"<td>{cell}</td>" for cell in cells(level))
    return f'<tr class="knee">{columns}</tr>' if is_knee else f"<tr>{columns}</tr>"
