"""Draws docs/status.svg: the screen of `sluice status`, by the code that shows it, with examples.

`make docs` writes it.
"""

import io
import re
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from deploy.status import Rates, Status, render
from tasks.contract.job import Lane
from tasks.queue.control import WorkerState, WorkerView
from tasks.queue.counts import Counted, Happening
from tasks.queue.statistics import Depth, ModelStats, QueueStats, RedisMemory

FILE = Path(__file__).parent / "status.svg"
COLUMNS = 88


def _model(name: str, interactive: int, batch: int, oldest_s: float) -> ModelStats:
    depth = {Lane.INTERACTIVE: Depth(interactive, 1.0), Lane.BATCH: Depth(batch, oldest_s)}
    return ModelStats.of(name, depth, WORKERS, set())


def _worker(name: str, model: str, running: int, kv_cache: float, ttft_ms: float) -> WorkerView:
    return WorkerView(
        *(name, model, 64, 1, WorkerState.SERVING, running, 0, kv_cache),
        *(ttft_ms, 2.2 * ttft_ms, "127.0.0.1:9100", 32_768),
    )


WORKERS = [
    _worker("gpu-0-4181", "qwen3-8b", 64, 0.71, 180),
    _worker("gpu-1-3977", "qwen3-8b", 64, 0.68, 164),
    _worker("gpu-2-5210", "llama-3.1-8b", 23, 0.19, 88),
]
STATS = QueueStats(
    listed=["qwen3-8b", "llama-3.1-8b"],
    models=[_model("qwen3-8b", 7, 412, 96.0), _model("llama-3.1-8b", 0, 0, 0.0)],
    leases=151,
    delayed=0,
    counts=Counter({Happening(Counted.DEAD, "letter"): 1}),
    body_bytes={},
    workers=WORKERS,
    maintenance="gpu-0-4102",
    ledger_records=4,
    memory=RedisMemory(0, 0, 0),
)
RATES = {"qwen3-8b": Rates(21.4, 20.9, 0.0), "llama-3.1-8b": Rates(6.0, 6.0, 0.0)}
EXAMPLE = Status(STATS, RATES, problems=[])


def screen() -> str:
    """The picture, which loads no font from elsewhere."""
    console = Console(
        file=io.StringIO(), record=True, width=COLUMNS, highlight=False, force_terminal=True
    )
    console.print(render(EXAMPLE))
    drawn = console.export_svg(title="sluice status", theme=MONOKAI, unique_id="status")
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    return drawn.replace("Fira Code, monospace", "monospace")


if __name__ == "__main__":
    FILE.write_text(screen())
