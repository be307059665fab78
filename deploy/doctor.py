"""`sluice doctor`: checks every part, and explains how to fix what is wrong.

Each check is a small function of deploy/doctor_servers.py or doctor_parts.py. One that fails or
hangs does not keep the others from being made.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import click
import orjson

from deploy import doctor_parts as parts
from deploy import doctor_servers as servers
from deploy.findings import Level, Remark, UnusableError, find_trouble, warning, wrong
from tasks.contract.settings import Settings, get_settings
from tasks.contract.trouble import explain

LONGEST_CHECK_S = 8.0

COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.WRONG: "red"}


class Check(NamedTuple):
    """What is checked, how, and which other checks must have found their part usable."""

    name: str
    make: Callable[[Settings], Iterator[Remark]]
    needs: tuple[str, ...] = ()


class Finding(NamedTuple):
    """One line of the output."""

    check: str
    level: Level
    found: str
    do: str


CHECKS = (
    Check("settings", parts.check_settings),
    Check("models", parts.check_models),
    Check("redis", servers.check_redis),
    Check("bus", servers.check_bus),
    Check("database", servers.check_database),
    Check("workers", parts.check_workers, ("redis", "models")),
    Check("maintenance", parts.check_maintenance, ("redis",)),
    Check("ledger", parts.check_ledger, ("redis",)),
    Check("pauses", parts.check_pauses, ("redis",)),
    Check("dead letters", servers.check_dead_letters, ("database",)),
    Check("model files", parts.check_model_files, ("models",)),
    Check("api", parts.check_api),
    Check("clock", servers.check_redis_clock, ("redis",)),
    Check("clock", servers.check_database_clock, ("database",)),
    Check("disk", parts.check_disk),
    Check("open files", parts.check_open_files),
)


def run(*, as_json: bool) -> int:
    """Runs all checks and prints what they find; returns the exit code: 1 if anything is wrong.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    levels = Counter[Level]()
    found = []
    for finding in diagnose(get_settings()):
        levels[finding.level] += 1
        found.append(finding._asdict())
        if not as_json:
            _show(finding)
    if as_json:
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    else:
        click.echo(", ".join(f"{levels[level]} {level}" for level in Level))
    return 1 if levels[Level.WRONG] else 0


def diagnose(settings: Settings) -> Iterator[Finding]:
    """Runs the checks, one after the other; yields what each finds."""
    unusable: set[str] = set()
    for check in CHECKS:
        missing = [name for name in check.needs if name in unusable]
        if missing:
            remarks = [warning(f"not checked without {missing[0]}", f"mend {missing[0]} first")]
        else:
            outcome = _Outcome(check, settings)
            remarks = outcome.await_remarks()
            unusable |= set() if outcome.is_usable else {check.name}
        for remark in remarks:
            yield Finding(check.name, *remark)


@dataclass
class _Outcome:
    """What a check has found so far."""

    check: Check
    settings: Settings
    is_usable: bool = False
    remarks: list[Remark] = field(default_factory=list)

    def await_remarks(self) -> list[Remark]:
        """Runs the check, in a thread that is abandoned when it takes too long."""
        thread = threading.Thread(target=self._make, daemon=True)
        thread.start()
        thread.join(LONGEST_CHECK_S)
        if not thread.is_alive():
            return self.remarks
        silence = f"no answer within {LONGEST_CHECK_S:.0f} s"
        return [*self.remarks, wrong(silence, "check whether it hangs, or the network to it does")]

    def _make(self) -> None:
        try:
            self.remarks.extend(self.check.make(self.settings))
            self.is_usable = True
        except UnusableError as unusable:
            self.remarks.append(unusable.remark)
        except Exception as failure:  # noqa: BLE001 (one broken part must not hide the others)
            if trouble := find_trouble(failure):
                self.remarks.append(wrong(trouble.found, trouble.do))
                return
            what = f"{type(failure).__name__}: {explain(failure, self.settings)}"
            self.remarks.append(wrong(f"the check itself failed ({what})", "report this line"))


def _show(finding: Finding) -> None:
    level = click.style(f"{finding.level:<8}", fg=COLOURS[finding.level])
    text = "; ".join(filter(None, (finding.found, finding.do)))
    click.echo(f"{level}{finding.check:<13}{text}")
