"""Sluice as it is installed without an engine: in an environment where nothing else is."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import requests
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench.stack import Process, await_that
from deploy.install import system_certificates
from deploy.redis_server import free_port

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")
LOCK = ROOT / "deploy" / "lock.txt"
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
    subprocess.run([*_install(environment, LOCK), wheel], check=True)
    return environment / "bin"


def _install(environment: Path, lock: Path) -> list[str | Path]:
    python = environment / "bin" / "python"
    options = ["--quiet", *system_certificates(), "--constraint", lock]
    return [UV, "pip", "install", "--python", python, *options]


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
        await_that(lambda: "Sluice is ready" in process.log.read_text(), 240, process.log.read_text)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill_all()


def test_nothing_is_installed_that_is_not_locked(installed: Path) -> None:
    locked = re.findall(r"^(\S+==\S+)", LOCK.read_text(), re.MULTILINE)
    freeze = [UV, "pip", "freeze", "--quiet", "--python", installed / "python"]
    frozen = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout.split("\n")
    assert [each for each in frozen if "==" in each and each not in locked] == []

    wanted = [Requirement(each) for each in metadata.requires("sluice") or []]
    names = {canonicalize_name(each.partition("==")[0]) for each in locked}
    gpu_only = {"vllm"}
    assert {canonicalize_name(each.name) for each in wanted} - names == gpu_only


def test_a_package_of_another_content_than_the_locked_one_is_refused(tmp_path: Path) -> None:
    other, text = tmp_path / "lock.txt", LOCK.read_text()
    package = re.search(r"^itsdangerous==(?:.|\n )*", text, re.MULTILINE)
    assert package
    forged = re.sub("sha256:....", "sha256:0000", package[0])
    other.write_text(text.replace(package[0], forged))
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "v"], check=True)
    install = [*_install(tmp_path / "v", other), "flask"]
    refused = subprocess.run(install, check=False, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "itsdangerous" in refused.stderr
    assert "sha256:0000" in refused.stderr


def test_the_wheel_alone_serves(up: str) -> None:
    chat = requests.post(f"{up}/v1/chat/completions", json=CHAT, timeout=120)
    assert chat.status_code == 200
    job = {"endpoint": "/v1/chat/completions", "body": CHAT}
    submitted = requests.post(f"{up}/v1/jobs", json=job, timeout=30).json()
    url, waiting = f"{up}/v1/jobs/{submitted['id']}", {"prefer": "wait=60"}
    assert requests.get(url, headers=waiting, timeout=120).json()["status"] == "completed"
