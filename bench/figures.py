"""Figures beside their aims, as a table and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.spread import Spread


@dataclass(frozen=True)
class Figure:
    """Something measured, over several rounds or once, and what it is meant to be."""

    name: str
    unit: str
    values: Spread
    at_least: float | None = None
    at_most: float | None = None

    @property
    def aim(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def verdict(self) -> str:
        if not self.aim:
            return ""
        is_low = self.at_least is not None and self.values.median < self.at_least
        is_high = self.at_most is not None and self.values.median > self.at_most
        return "missed" if is_low or is_high else "met"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"aim": self.aim, "verdict": self.verdict}


@dataclass
class Report:
    """What is collected on the way: figures, what else was seen, and wrong answers."""

    console: Console
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, name: str, unit: str, values: Sequence[float], **aim: float) -> None:
        self.figures.append(Figure(name, unit, Spread.of(values), **aim))

    def show(self) -> None:
        """Prints the table and the notes."""
        table = Table(title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, column in enumerate(("", "median (lowest..highest)", "aim", "")):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for one in self.figures:
            measured = f"{one.values} {one.unit}"
            table.add_row(one.name, measured, one.aim, one.verdict)
        self.console.print(table, *self.notes, sep="\n")
