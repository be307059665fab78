"""A model of one's own, by `sluice up --model` alone: it serves, or one sentence says why not."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from bench.stack import Process, Stack, await_that, serving, slack
from deploy.redis_server import free_port
from gpu_worker.engines.sources import BUNDLED_MODEL

# The load of an engine, and with all parts of vLLM another time for one that fails.
pytestmark = pytest.mark.timeout(900)

SLUICE = [sys.executable, "-m", "deploy.cli"]
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
# Of a kind that vLLM takes, without weights to load or code to compile.
AT_ONCE = ("--load-format", "dummy", "--enforce-eager")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small model with random weights, and the demo's tokenizer."""
    return _make(tmp_path / "own-model")


def _make(directory: Path, **changed: Any) -> Path:
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUNDLED_MODEL / name, directory)
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    config |= {"num_hidden_layers": 2} | changed
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def port() -> str:
    return str(free_port())


@pytest.fixture
def up(home: Path, directory: Path, port: str) -> Iterator[Process]:
    env = os.environ | {"SLUICE_HOME": str(home)}
    options = ["--model", directory.name, "--port", port, "--", *AT_ONCE]
    command = ["env", "-C", str(directory.parent), *SLUICE, "up", *options]
    process = Process(command, env | {"PYTHONPATH": str(Path.cwd())}, home / "up.log")
    yield process
    process.kill_all()


def test_a_directory_serves_without_a_models_yaml(up: Process, home: Path, port: str) -> None:
    def is_ready() -> bool:
        assert up.popen.poll() is None, up.log.read_text()
        return "Sluice is ready" in up.log.read_text()

    await_that(is_ready, 600, lambda: (home / "logs" / "worker.log").read_text()[-3000:])
    url = f"http://127.0.0.1:{port}/v1"
    assert requests.get(f"{url}/models/own-model", timeout=60).json()["max_model_len"] == 2048
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    # The template determines which of vLLM's parsers reads this model's tool calls.
    for asked in (chat, chat | {"tools": [TOOL], "tool_choice": "auto"}):
        answer = requests.post(f"{url}/chat/completions", json=asked, timeout=240)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "own-model"


def test_what_fails_in_vllms_processes_is_one_sentence(home: Path, directory: Path) -> None:
    flags = ("--", *AT_ONCE, "--gpu-memory-utilization", "1.0")
    ended = _run_up(home, 600, "--model", str(directory), "--port", str(free_port()), *flags)
    assert ended.returncode == 1
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith(
        "sluice: worker did not start: vLLM cannot load own-model: ValueError: Available memory"
    )
    assert "decrease `--gpu-memory-utilization`" in sentence
    assert sentence.endswith(f"(its log: {home}/logs/worker.log)")
    assert "Traceback" not in ended.stdout


def _run_up(
    home: Path, timeout_s: float, *options: str, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SLUICE, "up", *options],
        env=os.environ | {"SLUICE_HOME": str(home)} | env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


REFUSED = {
    "a flag that there is not": (
        {"args": {"max-modle-len": 64}},
        "the arguments of own: unrecognized arguments: --max-modle-len",
    ),
    "a context that is too long": (
        {"args": {"max-model-len": 100_000}},
        "vLLM cannot load own: User-specified max_model_len (100000) is greater than the derived",
    ),
    "an architecture that vLLM does not know": (
        {"config": {"architectures": ["OwnForCausalLM"], "model_type": "own"}},
        "vLLM cannot load own: ",
    ),
    "kernels that a CPU has not": (
        {"entry": {"batch_invariant": True}},
        "batch_invariant of own: vLLM has such kernels for GPUs only",
    ),
    "no model": ({"config": None}, "holds no model (no config.json)"),
}


def test_what_is_wrong_with_a_model_is_the_last_line_of_its_workers_log(
    server: Stack, tmp_path: Path
) -> None:
    workers = {}
    for number, (what, (wrong, _)) in enumerate(REFUSED.items()):
        home = tmp_path / str(number)
        home.mkdir()
        config = wrong.get("config", {})
        directory = _make(home / "own", **config or {})
        if config is None:
            (directory / "config.json").unlink()
        entry = {"name": "own", "source": str(directory), "args": wrong.get("args", {})}
        entry |= wrong.get("entry", {})
        (home / "models.yaml").write_text(json.dumps({"models": [entry]}))
        env = server.env | {"SLUICE_HOME": str(home), "SLUICE_MODELS": str(home / "models.yaml")}
        workers[what] = Process([*SLUICE, "worker"], env, home / "worker.log")
    try:
        for what, worker in workers.items():
            assert worker.popen.wait(600) == 2
            last = worker.log.read_text().rstrip().splitlines()[-1]
            assert last.startswith("sluice: "), last
            assert REFUSED[what][1] in last
            assert len(last) < 900
    finally:
        for worker in workers.values():
            worker.kill_all()


class _NoSuchModel(BaseHTTPRequestHandler):
    """The Hub, as it answers for a model that it does not have."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Silence(_NoSuchModel):
    """A Hub that does not answer before any timeout."""

    def do_GET(self) -> None:
        time.sleep(7)


def _hub(home: Path, endpoint: str) -> dict[str, str]:
    return {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": endpoint}


def _assert_refused(home: Path, sentence: str, **env: str) -> None:
    begun_s = time.monotonic()
    ended = _run_up(home, 240, "--model", "nobody/own", "--port", str(free_port()), **env)
    assert time.monotonic() - begun_s < slack(45)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert sentence in line
    # Nothing was started for it.
    assert ended.stdout == ""
    assert not list((home / "logs").iterdir())


def test_a_hub_id_without_a_hub_is_refused_at_once(home: Path) -> None:
    away = _hub(home, f"http://127.0.0.1:{free_port()}")
    _assert_refused(home, "cannot be reached", **away)
    _assert_refused(home, "HF_HUB_OFFLINE forbids to download it", **away, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    ("hub", "sentence"), [(_NoSuchModel, "has no model of that name"), (_Silence, "timed out")]
)
def test_a_model_that_the_hub_does_not_give_is_refused_within_seconds(
    home: Path, hub: type[BaseHTTPRequestHandler], sentence: str
) -> None:
    with serving(HTTPServer(("127.0.0.1", 0), hub)) as server:
        _assert_refused(home, sentence, **_hub(home, f"http://127.0.0.1:{server.server_port}"))


def test_a_model_that_was_downloaded_needs_no_hub(home: Path, directory: Path) -> None:
    downloaded = home / "hf" / "hub" / "models--nobody--own"
    (downloaded / "refs").mkdir(parents=True)
    (downloaded / "refs" / "main").write_text("abc")
    (downloaded / "snapshots").mkdir()
    directory.replace(downloaded / "snapshots" / "abc")
    check = (
        "from gpu_worker.engines.sources import *; "
        "refuse_missing(Model(name='m', source='nobody/own'))"
    )
    subprocess.run(
        [sys.executable, "-c", check],
        env=os.environ | _hub(home, f"http://127.0.0.1:{free_port()}"),
        check=True,
        timeout=240,
    )
