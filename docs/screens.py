"""Draws docs/status.svg: the screen of `sluice status`, by the code that shows it, with examples.

`make docs` writes it.
"""

import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from deploy.status import ModelStatus, Rates, Status, render
from tasks.contract.job import Lane
from tasks.queue.control import WorkerState, WorkerView
from tasks.queue.depth import Depth

FILE = Path(__file__).parent / "status.svg"
COLUMNS = 88


def _model(name: str, waiting: tuple[int, int], oldest_s: float, rates: Rates) -> ModelStatus:
    interactive, batch = waiting
    workers = [worker for worker in WORKERS if worker.model == name]
    return ModelStatus(
        name=name,
        is_paused=False,
        depth={Lane.INTERACTIVE: Depth(interactive, 1.0), Lane.BATCH: Depth(batch, oldest_s)},
        serving=len(workers),
        draining=0,
        slots=sum(worker.slots for worker in workers),
        slots_used=sum(worker.running + worker.waiting for worker in workers),
        engine_waiting=sum(worker.waiting for worker in workers),
        kv_cache_usage=max(worker.kv_cache_usage for worker in workers),
        ttft_p50_ms=max(worker.ttft_p50_ms or 0 for worker in workers),
        ttft_p95_ms=max(worker.ttft_p95_ms or 0 for worker in workers),
        rates_per_s=rates,
    )


def _worker(name: str, model: str, running: int, kv_cache: float, ttft_ms: float) -> WorkerView:
    return WorkerView(
        *(name, model, 64, WorkerState.SERVING, running, 0, kv_cache),
        *(ttft_ms, 2.2 * ttft_ms, "127.0.0.1:9100", 32_768),
    )


WORKERS = [
    _worker("gpu-0-4181", "qwen3-8b", 64, 0.71, 180),
    _worker("gpu-1-3977", "qwen3-8b", 64, 0.68, 164),
    _worker("gpu-2-5210", "llama-3.1-8b", 23, 0.19, 88),
]
EXAMPLE = Status(
    models=[
        _model("qwen3-8b", (7, 412), 96.0, Rates(21.4, 20.9, 0.0)),
        _model("llama-3.1-8b", (0, 0), 0.0, Rates(6.0, 6.0, 0.0)),
    ],
    workers=WORKERS,
    leases=151,
    delayed=0,
    dead_letters=1,
    ledger_records=4,
    maintenance="gpu-0-4102",
)


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
