"""Programs that are measured and not part of Sluice, each in an environment of its own."""

import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from bench.stacks import StackError

PINS = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sluice" / "peers"


def program(name: str) -> str:
    """The path of that program; made from its file of pinned versions when that is new.

    Raises:
        StackError: it cannot be installed.
    """
    pins = PINS / f"{name}.txt"
    home = CACHE / f"{name}-{sha256(pins.read_bytes()).hexdigest()[:12]}"
    if not (done := home / "installed").exists():
        _install(pins, home)
        done.touch()
    return str(home / "bin" / name)


def _install(pins: Path, home: Path) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if not uv:
        raise StackError(f"{pins.stem} is installed with uv; `make test` brings it")
    make = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(home)]
    fill = [uv, "pip", "install", "--quiet", "--python", str(home / "bin" / "python")]
    for command in (make, [*fill, "--require-hashes", "--requirement", str(pins)]):
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise StackError(f"{pins.stem} cannot be installed:\n{done.stderr[-2000:]}")
