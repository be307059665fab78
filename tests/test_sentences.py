"""A wrong setting, a server that is away, a full disk: each gets one sentence."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import orjson
import psycopg
import pytest
import redis
import requests
from click.testing import CliRunner

from bench.postgres import Postgres
from bench.stack import Process, Stack, await_that, serving
from db import migrate
from deploy.cli import main
from deploy.redis_server import answers, find_server, free_port, server_command
from tasks.contract import keys
from tasks.contract.models import get_catalog
from tasks.contract.settings import get_settings

SECRET = "7f-secret"
WORKER = "a-worker"
PARTS = {"up": ["up"], "api": ["api"], "worker": ["worker"], "maintenance": ["maintenance"]}
COMMANDS = [
    *(["doctor"], ["status"], ["jobs"], ["submit", "x"], ["watch", "job_1"], ["cancel", "job_1"]),
    *(["pause", "sim"], ["drain"], ["dead", "list"], ["bench"], ["webhooks", "test", "http://x"]),
]
NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A state directory of its own, and a model that needs no engine."""
    own = {"SLUICE_HOME": str(tmp_path / "home"), "SLUICE_MODEL": "sim"}
    return own | {"SLUICE_PORT": str(free_port()), "SLUICE_REDIS_URL": NOWHERE}


def invoke(arguments: list[str], env: dict[str, str]) -> str:
    """The sentence with which the program ends, run in this process."""
    for read_once in (get_settings, get_catalog):
        read_once.cache_clear()
    try:
        done = CliRunner().invoke(main, arguments, env=env)
    finally:
        for read_once in (get_settings, get_catalog):
            read_once.cache_clear()
    return sentence(done.exit_code, done.stderr)


def run(command: list[str], env: dict[str, str]) -> str:
    """The sentence with which a program of its own ends."""
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )
    return sentence(done.returncode, done.stderr)


def sluice(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deploy.cli", *arguments]


def sentence(code: int, errors: str) -> str:
    assert code in (1, 2), errors
    assert SECRET not in errors
    (line,) = errors.splitlines()
    assert line.startswith("sluice: "), errors
    return line


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT/0 of a Redis whose password is the secret, with a worker."""
    home, port = tmp_path_factory.mktemp("guarded"), free_port()
    command = server_command(find_server(), home, port, SECRET)
    process = Process(command, dict(os.environ), home / "log")
    await_that(lambda: answers(f"redis://:{SECRET}@127.0.0.1:{port}/0"))
    with redis.Redis(port=port, password=SECRET) as client:
        client.hset(keys.worker(WORKER), mapping={"model": "sim", "slots": 1})
        client.sadd(keys.WORKERS, WORKER)
    yield f"127.0.0.1:{port}/0"
    process.stop()


class Website(BaseHTTPRequestHandler):
    """Something else than a Redis."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def website() -> Iterator[str]:
    with serving(HTTPServer(("127.0.0.1", 0), Website)) as server:
        yield f"127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("command", [*PARTS.values(), *COMMANDS], ids=" ".join)
def test_every_command_reports_that_its_home_is_a_file(
    command: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "home").touch()
    seen = run(sluice(*command), env) if command[0] in PARTS else invoke(command, env)
    assert f"SLUICE_HOME='{tmp_path / 'home'}': that is no directory; name one" in seen


def test_a_command_reports_that_the_home_of_its_user_is_a_file(
    env: dict[str, str], tmp_path: Path
) -> None:
    """It said that no Redis answered."""
    (tmp_path / "user").touch()
    own = {name: value for name, value in env.items() if name != "SLUICE_HOME"}
    seen = run(sluice("status"), own | {"HOME": str(tmp_path / "user")})
    assert f"{tmp_path / 'user'} is no directory; name one" in seen


@pytest.mark.parametrize("key", [f"{SECRET}\n", f" {SECRET}", f"{SECRET}\t", " ", f"{SECRET}é"])
def test_an_admin_key_that_no_header_can_hold(key: str, env: dict[str, str]) -> None:
    """It was taken, and each request with it got 401."""
    seen = run(sluice("api"), env | {"SLUICE_ADMIN_KEY": key})
    assert "SLUICE_ADMIN_KEY=…: no header can hold it; give printable ASCII characters" in seen


REDIS_URLS = {
    "localhost:6379": "write it as redis://",
    f":{SECRET}@localhost:6379": "'…@localhost:6379': write it as redis://",
    f"redis://:odd/{SECRET}@localhost": "odd characters of the password as %XX",
    f"http://:{SECRET}@localhost": "'http://:…@localhost': write it as redis://",
    "redis://localhost/jobs": "write it as redis://",
    "redis://localhost/0?colour=red": "write it as redis://",
    f"redis://:{SECRET}@nowhere.invalid/0": "no Redis answers at redis://:…@nowhere.invalid/0 (",
    f"redis://:{SECRET}@127.0.0.1:1/0": "start it, or set {} to where it runs",
    "redis://{website}/0": "what answers at redis://{website}/0 is no Redis",
    f"redis://:not-{SECRET}@{{guarded}}": "refuses the user or the password (",
    "redis://{guarded}": "give {} a user and a password that may use all commands",
    f"redis://:{SECRET}@{{guarded}}99": "has no database of that number (DB index is out of range)",
}


@pytest.mark.parametrize("variable", ["SLUICE_REDIS_URL", "SLUICE_BUS_URL"])
@pytest.mark.parametrize("url", REDIS_URLS)
def test_a_wrong_redis(
    variable: str, url: str, env: dict[str, str], guarded: str, website: str
) -> None:
    servers = {"guarded": guarded, "website": website}
    expected = REDIS_URLS[url].replace("{}", variable).format(**servers)
    env["SLUICE_REDIS_URL"] = f"redis://:{SECRET}@{guarded}"
    # Draining uses both.
    seen = invoke(["drain", WORKER], env | {variable: url.format(**servers)})
    assert expected in seen
    assert variable in seen


@pytest.mark.parametrize("part", PARTS)
def test_no_part_waits_for_the_right_password(part: str, env: dict[str, str], guarded: str) -> None:
    env["SLUICE_REDIS_URL"] = f"redis://:not-{SECRET}@{guarded}"
    assert "refuses the user or the password" in run(sluice(*PARTS[part]), env)


def test_a_part_waits_for_a_redis_that_is_away(env: dict[str, str], tmp_path: Path) -> None:
    process = Process(sluice("maintenance"), os.environ | env, tmp_path / "log")
    try:
        await_that(lambda: "no Redis answers at" in process.log.read_text())
        assert process.popen.poll() is None
    finally:
        process.kill_all()
    assert "Traceback" not in process.log.read_text()


DATABASE_URLS = {
    f"me:{SECRET}@localhost": "'…@localhost': write it as sqlite:////PATH or, for PostgreSQL",
    f"postgres://me:{SECRET}@localhost/x": "postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME",
    f"postgresql+psycopg://me:{SECRET}@localhost:x/x": "SLUICE_DATABASE_URL is no URL of",
    f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/x": "start it, or set SLUICE_DATABASE_URL",
    f"postgresql://me:{SECRET}@127.0.0.1:1/x": "no database answers at postgresql://me:…@127",
    f"postgresql+psycopg://me:not-{SECRET}@{{postgres}}/x": "refuses the user or the password (",
    "postgresql+psycopg://postgres@{postgres}/x": "there is no such database at postgresql+",
    "sqlite:///{tmp}/nowhere/x.db": "see that it and its directory are there",
    "sqlite:///{tmp}/text.db": "/text.db is another kind of file; name another file in",
    "sqlite:///{tmp}": "cannot be written (",
    "sqlite:///{tmp}/empty.db": "start the API or maintenance once: they make them",
    "sqlite://nowhere/x.db": "SLUICE_DATABASE_URL is no URL of SQLAlchemy's; write it as",
}


@pytest.fixture(scope="module")
def login(postgres: Postgres) -> str:
    """HOST:PORT of a PostgreSQL that asks its user `me` for a password."""
    with psycopg.connect(postgres.url().replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE ROLE me LOGIN PASSWORD 'other'")
        (hba,) = connection.execute("SHOW hba_file").fetchone() or ()
        rules = Path(hba).read_text()
        Path(hba).write_text(f"host all me 127.0.0.1/32 scram-sha-256\n{rules}")
        connection.execute("SELECT pg_reload_conf()")
        asks = "SELECT type FROM pg_hba_file_rules WHERE 'me' = ANY(user_name)"
        await_that(lambda: connection.execute(asks).fetchone())
    return postgres.url().partition("@")[2].partition("/")[0]


@pytest.mark.parametrize("url", DATABASE_URLS)
def test_a_wrong_database(url: str, env: dict[str, str], login: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("This is no database. " * 100)
    seen = invoke(
        ["dead", "list"],
        env | {"SLUICE_DATABASE_URL": url.format(postgres=login, tmp=tmp_path)},
    )
    assert DATABASE_URLS[url] in seen


def test_a_database_that_takes_no_writes(env: dict[str, str], tmp_path: Path) -> None:
    migrate(f"sqlite:///{tmp_path}/sluice.db")
    env["SLUICE_DATABASE_URL"] = f"sqlite:///file:{tmp_path}/sluice.db?mode=ro&uri=true"
    seen = invoke(["dead", "purge", "--all"], env)
    assert "cannot be written (" in seen
    assert "readonly database" in seen


def test_the_driver_of_postgresql_is_not_installed(env: dict[str, str], tmp_path: Path) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'psycopg'\", name='psycopg')\n"
    (tmp_path / "psycopg.py").write_text(missing)
    env["PYTHONPATH"] = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    env["SLUICE_DATABASE_URL"] = f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/x"
    assert "install Sluice with its extra `postgres`" in run(sluice("dead", "list"), env)


@pytest.mark.parametrize("part", ["up", "api", "maintenance"])
def test_no_part_waits_for_another_database(
    part: str, env: dict[str, str], tmp_path: Path, guarded: str
) -> None:
    (tmp_path / "text.db").write_text("This is no database. " * 100)
    env["SLUICE_REDIS_URL"] = f"redis://:{SECRET}@{guarded}"
    env["SLUICE_DATABASE_URL"] = f"sqlite:///{tmp_path}/text.db"
    assert "name another file in SLUICE_DATABASE_URL" in run(sluice(*PARTS[part]), env)


def test_up_does_not_start_without_its_postgresql(env: dict[str, str], guarded: str) -> None:
    env["SLUICE_REDIS_URL"] = f"redis://:{SECRET}@{guarded}"
    env["SLUICE_DATABASE_URL"] = f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/x"
    assert "start it, or set SLUICE_DATABASE_URL to where it runs" in run(sluice("up"), env)


MODELS = {
    "": "line 1: models: Field required",
    "models: []": "line 1: models: List should have at least 1 item",
    "models:\n  - name: a\n  slots: 3": "line 3: not YAML (",
    "models:\n  - name: [a": "line 2: not YAML (",
    "models:\n  - name: \x07": "not YAML (",
    "models:\n  - name: a\n    since: 2020-13-45": "not YAML (",
    "models:\n  - name: a\n    sauce: b": "line 3: models.0.sauce: no model has such a field",
    "models:\n  - name: a\n\n  - engine: sim": "line 4: models.1.name: Field required",
    "models:\n  - name: a\n    slots: many": "line 3: models.0.slots: Input should be a valid int",
    "models:\n  - name: a\n    env: x": "line 3: models.0.env: Input should be a valid dict",
    "models:\n  - name: a\n    engine: gpt": "line 3: models.0.engine: Input should be 'vllm', 's",
    "models:\n  - a": "line 2: models.0: Input should be",
    "models:\n  - name: a\n  - name: a": "line 3: models.1.name: line 2 has the name 'a' already",
    "models:\n  - name: a\n    aliases:\n      - a": "line 4: models.0.aliases.0: line 2 has",
}


@pytest.mark.parametrize("content", MODELS)
def test_a_wrong_models_file(content: str, env: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(content)
    seen = invoke(["status"], env | {"SLUICE_MODELS": str(file), "SLUICE_MODEL": ""})
    assert f"{file}" in seen
    assert MODELS[content] in seen


@pytest.mark.parametrize(("path", "why"), [("none.yaml", "No such file"), (".", "Is a directory")])
def test_a_models_file_that_is_none(
    path: str, why: str, env: dict[str, str], tmp_path: Path
) -> None:
    seen = invoke(["status"], env | {"SLUICE_MODELS": str(tmp_path / path)})
    assert f"cannot read {tmp_path / path} ({why}" in seen
    assert "set SLUICE_MODELS to the path of a models.yaml" in seen


def on_small_disk(directory: Path, command: list[str], setup: str = "true") -> list[str]:
    """The command, where a disk of 1 MiB lies at the directory.

    Mounting takes a namespace of its own, which Linux gives to every user.
    """
    directory.mkdir(exist_ok=True)
    unshare = shutil.which("unshare")
    assert unshare, "tests need `unshare`: `apt-get install util-linux`"
    script = f'mount -t tmpfs -o size=1m none "$0" || exit 99; {setup}; exec "$@"'
    namespace = [unshare, "--user", "--map-root-user", "--mount"]
    return [*namespace, "sh", "-c", script, str(directory), *command]


FILL = 'cat /dev/zero 2>/dev/null > "$0/fill"'


@pytest.mark.parametrize("part", PARTS)
def test_no_part_starts_on_a_full_disk(part: str, env: dict[str, str], tmp_path: Path) -> None:
    seen = run(on_small_disk(tmp_path / "home", sluice(*PARTS[part]), FILL), env)
    assert f"the disk of {tmp_path / 'home'} is full; delete what is not needed there" in seen
    assert "or set SLUICE_HOME to a directory on another disk" in seen


def test_a_write_to_a_database_on_a_full_disk(env: dict[str, str], tmp_path: Path) -> None:
    migrate(f"sqlite:///{tmp_path}/old.db")
    copy = f'cp {tmp_path}/old.db "$0/sluice.db"; {FILL}'
    purge = sluice("dead", "purge", "--all")
    seen = run(on_small_disk(tmp_path / "home", purge, copy), env)
    assert f"the disk of the database at sqlite:///{tmp_path / 'home'}/sluice.db is full" in seen


def test_doctor_reports_which_disk_is_full(env: dict[str, str], tmp_path: Path) -> None:
    command = on_small_disk(tmp_path / "home", sluice("doctor", "--json"), FILL)
    done = subprocess.run(command, env=os.environ | env, capture_output=True, check=False)
    assert done.returncode == 1
    (disk,) = [line for line in orjson.loads(done.stdout) if line["check"] == "disk"]
    assert disk["level"] == "wrong"
    assert disk["found"] == f"the disk of {tmp_path / 'home'} is full: 0 MiB are free"
    assert disk["do"].startswith("delete what is not needed there, or set SLUICE_HOME")


@pytest.mark.parametrize("part", PARTS)
def test_a_home_that_cannot_be_written(part: str, env: dict[str, str], tmp_path: Path) -> None:
    read_only = 'mount -o remount,ro "$0"'
    seen = run(on_small_disk(tmp_path / "home", sluice(*PARTS[part]), read_only), env)
    assert f"cannot use {tmp_path / 'home'} ({os.strerror(errno.EROFS)}); see that it" in seen
    assert "or set SLUICE_HOME to a directory of this user" in seen


@pytest.fixture
def full_redis(env: dict[str, str], tmp_path: Path) -> Iterator[redis.Redis]:
    """One whose disk is full."""
    disk, port = tmp_path / "disk", free_port()
    options = ["--port", str(port), "--dir", str(disk), "--appendonly", "yes", "--save", ""]
    command = on_small_disk(disk, [str(find_server()), *options])
    env["SLUICE_REDIS_URL"] = f"redis://127.0.0.1:{port}/0"
    process = Process(command, dict(os.environ), tmp_path / "redis.log")
    client = redis.Redis(port=port)
    try:
        await_that(lambda: answers(env["SLUICE_REDIS_URL"]), 30, process.log.read_text)
        await_that(lambda: is_full(client))
        yield client
    finally:
        client.close()
        process.kill_all()


def is_full(client: redis.Redis) -> bool:
    try:
        client.set("filler", b"x" * 2**19)
    except redis.ResponseError as refused:
        return "MISCONF" in str(refused)
    return False


def test_a_redis_whose_disk_is_full(
    full_redis: redis.Redis, env: dict[str, str], tmp_path: Path
) -> None:
    full = f"takes no writes: the disk of {tmp_path}/disk, on its machine, is full"
    for command in (["status", "--once"], ["pause", "sim"]):
        seen = invoke(command, env)
        assert full in seen
        assert "delete what is not needed there; Redis then goes on by itself" in seen
    done = subprocess.run(
        sluice("doctor", "--json"), env=os.environ | env, capture_output=True, check=False
    )
    found = orjson.loads(done.stdout)
    (line,) = [line for line in found if full in line["found"]]
    assert (line["check"], line["level"]) == ("redis", "wrong")
    assert b"itself failed" not in done.stdout
    assert b"not checked without redis" not in done.stdout


def test_the_api_answers_503_while_the_disk_of_redis_is_full(
    full_redis: redis.Redis, env: dict[str, str], tmp_path: Path
) -> None:
    process = Process(sluice("api"), os.environ | env, tmp_path / "api.log")
    url = f"http://127.0.0.1:{env['SLUICE_PORT']}"

    def lives() -> bool:
        try:
            return requests.get(f"{url}/health/live", timeout=2).ok
        except requests.RequestException:
            return False

    try:
        await_that(lives, 60, process.log.read_text)
        chat = {"messages": [{"role": "user", "content": "Hello"}], "model": "sim"}
        answer = requests.post(f"{url}/v1/chat/completions", json=chat, timeout=20)
    finally:
        process.kill_all()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "queue_unavailable"
    assert int(answer.headers["Retry-After"]) > 0
    assert "is full; delete what is not needed there" in process.log.read_text()


def test_a_redis_whose_memory_is_full(server: Stack, env: dict[str, str]) -> None:
    env["SLUICE_REDIS_URL"] = server.env["SLUICE_REDIS_URL"]
    server.redis.config_set("maxmemory", 1)
    try:
        for command in (["pause", "sim"], ["status", "--once"]):
            seen = invoke(command, env)
            assert "takes no writes: all that its maxmemory allows is in use; give it a" in seen
    finally:
        server.redis.config_set("maxmemory", 0)
