"""Reads the files of text/."""

from pathlib import Path
from typing import Any

import yaml

TEXT = Path(__file__).parent / "text"


def read(name: str) -> Any:
    """Parse one YAML file."""
    return yaml.safe_load((TEXT / name).read_text(encoding="utf-8"))
