"""The commands of docs/deploy.md and docs/operations.md, run outside of containers."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def text(page: str = "deploy.md") -> str:
    """The page; each command, also one within a sentence, begins a line."""
    return (DOCS / page).read_text().replace("`docker", "\ndocker").replace("`", "\n")


def command(start: str, page: str = "deploy.md") -> str:
    """The one that begins like that, with the lines on which it goes on."""
    (found,) = re.findall(rf"^ *({re.escape(start)}(?:.*\\\n)*.*)", text(page), re.MULTILINE)
    return str(found)


def block(word: str) -> str:
    """The commands or the file among which that is."""
    page = (DOCS / "deploy.md").read_text()
    blocks = re.findall(r"^ *```\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return str(found)


def run(commands: str, places: Mapping[str, str], directory: Path, **env: str) -> str:
    """What they print in that directory, with what is elsewhere outside of containers replaced."""
    for shipped, here in places.items():
        assert shipped in commands, shipped
        commands = commands.replace(shipped, here)
    done = subprocess.run(
        ["sh", "-ec", commands],
        cwd=directory,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
