"""Writes the dashboards as Grafana imports them."""

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.dashboards import overview, queue, workers

DIRECTORY = Path(__file__).parents[1] / "grafana"


def generate() -> dict[Path, str]:
    """The text of each file."""
    boards = {"overview": overview.made(), "queue": queue.made(), "workers": workers.made()}
    return {
        DIRECTORY / f"{name}.json": json.dumps(board, cls=JSONEncoder, indent=2) + "\n"
        for name, board in boards.items()
    }


if __name__ == "__main__":
    for path, text in generate().items():
        path.write_text(text)
