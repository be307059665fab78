"""Sluice as it is installed without an engine: in an environment where nothing else is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.install import system_certificates
from deploy.redis_server import free_port
from tests.stack import Process, await_that

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the commands of an environment with nothing but the wheel."""
    directory = tmp_path_factory.mktemp("core")
    environment, wheels = directory / "environment", directory / "wheels"
    build = [UV, "build", "--quiet", "--out-dir", wheels, *system_certificates()]
    subprocess.run([*build, ROOT], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    install = [UV, "pip", "install", "--quiet", *system_certificates()]
    subprocess.run([*install, "--python", environment / "bin" / "python", wheel], check=True)
    return environment / "bin"


@pytest.fixture
def up(installed: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of a Sluice that was started where other packages have the names of ours."""
    elsewhere = tmp_path / "elsewhere"
    for package in ("api", "gpu_worker", "db"):
        (elsewhere / package).mkdir(parents=True)
        (elsewhere / package / "__init__.py").write_text("raise SystemExit('not ours')\n")
    (elsewhere / "tasks.py").write_text("raise SystemExit('not ours')\n")
    port = str(free_port())
    own = {"SLUICE_HOME": str(tmp_path), "SLUICE_MODEL": "sim", "SLUICE_PORT": port}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    command = ["env", "-C", str(elsewhere), str(installed / "sluice"), "up"]
    process = Process(command, env, tmp_path / "up.log")
    try:
        await_that(lambda: "Sluice is ready" in process.log.read_text(), 60, process.log.read_text)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill_all()


def test_the_wheel_alone_serves(up: str) -> None:
    chat = requests.post(f"{up}/v1/chat/completions", json=CHAT, timeout=30)
    assert chat.status_code == 200
    job = {"endpoint": "/v1/chat/completions", "body": CHAT}
    submitted = requests.post(f"{up}/v1/jobs", json=job, timeout=30).json()
    url, waiting = f"{up}/v1/jobs/{submitted['id']}", {"prefer": "wait=20"}
    assert requests.get(url, headers=waiting, timeout=30).json()["status"] == "completed"
