"""The files of docker-compose.yml run without containers: all parts, from a client to an alert."""

import json
import re
import shutil
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
import redis
import requests
from sqlalchemy import make_url

from bench.nginx import Nginx
from bench.postgres import Postgres, _program
from bench.stack import await_that, running
from deploy import make_secrets
from tasks.contract import keys
from tests import deploy_page
from tests.deployment import Deployment
from tests.prometheus import Alertmanager, Prometheus, alertmanager_config, prometheus_config
from tests.test_dashboards import BOARDS, queries
from tests.test_doctor import Diagnosis
from tests.test_webhooks import Receiver, receiving

pytestmark = pytest.mark.timeout(600)

WORKERS = 2
QUESTION = [{"role": "user", "content": "Hello"}]
REQUESTS = 8


@dataclass(frozen=True)
class Running:
    """All that compose starts."""

    parts: Deployment
    nginx: Nginx
    prometheus: Prometheus
    alertmanager: Alertmanager
    receiver: Receiver
    key: str

    def client(self) -> openai.OpenAI:
        """OpenAI's own, of a user."""
        trusted = ssl.create_default_context(cafile=self.nginx.authority)
        http = openai.DefaultHttpxClient(verify=trusted)
        return openai.OpenAI(
            base_url=f"{self.nginx.url}/v1", api_key=self.key, max_retries=0, http_client=http
        )

    def get(self, path: str) -> requests.Response:
        return requests.get(self.nginx.url + path, verify=str(self.nginx.authority), timeout=60)

    def run(self, start: str, places: dict[str, str], page: str = "deploy.md") -> str:
        """What a command of the page prints; its files are beside `secrets/`."""
        shown = deploy_page.command(start, page)
        path = self.nginx.environment()["PATH"]
        return deploy_page.run(shown, places, self.parts.home, KEY=self.key, PATH=path)

    def received(self) -> set[tuple[str, str]]:
        """The receivers that were called, and with which alert."""
        return {
            (path, alert["labels"]["alertname"])
            for path, _, body in list(self.receiver.requests)
            for alert in json.loads(body)["alerts"]
        }


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Running]:
    """Two APIs, two workers and two maintenance processes between the servers that they need."""
    home, for_prometheus, for_alertmanager = map(
        tmp_path_factory.mktemp, ("deployment", "prometheus", "alertmanager")
    )
    parts = Deployment(home, postgres.create_database())
    migrated = parts.sluice("migrate")
    assert migrated.returncode == 0, migrated.stderr
    with ExitStack() as up:
        up.enter_context(running(parts, workers=WORKERS))
        parts.start_api()
        parts.start_maintenance()
        receiver = up.enter_context(receiving())
        address = f"127.0.0.1:{receiver.server_port}"
        alertmanager = up.enter_context(
            Alertmanager(alertmanager_config(for_alertmanager, address))
        )
        key = parts.create_key("prometheus", "operator")
        config = prometheus_config(for_prometheus, parts, key, alertmanager.address)
        yield Running(
            parts,
            up.enter_context(Nginx(home, parts.secrets, parts.api_ports)),
            up.enter_context(Prometheus(config)),
            alertmanager,
            receiver,
            parts.create_key("app"),
        )


def test_openais_client_streams_through_tls(deployment: Running) -> None:
    with deployment.client() as client:
        whole = client.chat.completions.create(model="sim", messages=QUESTION, max_tokens=20)
        stream = client.chat.completions.create(
            model="sim", messages=QUESTION, max_tokens=20, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) >= 20
    assert "".join(pieces) == whole.choices[0].message.content


def test_both_apis_have_their_share(deployment: Running) -> None:
    with deployment.client() as client, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: client.models.list(), range(REQUESTS)))

    def served() -> set[object]:
        return {line["api"] for line in deployment.nginx.access_log() if line["status"] == 200}

    await_that(lambda: served() >= {f"127.0.0.1:{port}" for port in deployment.parts.api_ports})


def test_nobody_gets_in_without_a_key_or_without_tls(deployment: Running) -> None:
    assert deployment.get("/v1/models").status_code == 401
    plain = f"http://127.0.0.1:{deployment.nginx.plain_port}/v1/models?limit=1"
    moved = requests.get(plain, allow_redirects=False, timeout=60)
    there = f"https://127.0.0.1:{deployment.nginx.port}/v1/models?limit=1"
    assert (moved.status_code, moved.headers["location"]) == (308, there)
    followed = requests.get(plain, verify=str(deployment.nginx.authority), timeout=60)
    assert (followed.url, followed.status_code) == (there, 401)
    answer = deployment.get("/health/live")
    assert answer.headers["strict-transport-security"] == "max-age=63072000"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_no_secret_is_in_an_environment_a_command_line_or_a_log(deployment: Running) -> None:
    parts = deployment.parts
    names = ("admin_key", "redis_password", "postgres_password", "webhook_secrets")
    secrets = [parts.read(name) for name in names]
    for part in parts.processes:
        process = psutil.Process(part.pid)
        shown = [*process.environ().values(), *process.cmdline(), part.log.read_text()]
        assert [secret for secret in secrets if any(secret in text for text in shown)] == []


def test_the_exporter_of_redis_reads_figures_and_no_job(deployment: Running) -> None:
    parts = deployment.parts
    users = [
        f"{user}:{parts.read(name)}@"
        for user, name in (("", "redis_password"), ("exporter", "redis_exporter_password"))
    ]
    with redis.Redis.from_url(parts.redis_url.replace(*users)) as exporter:
        assert exporter.info()["redis_version"]
        assert exporter.config_get("maxmemory")
        assert exporter.slowlog_len() >= 0
        job = next(parts.redis.scan_iter(count=1000))
        for ask in (
            lambda: exporter.type(job),
            lambda: exporter.slowlog_get(1),
            exporter.flushall,
            lambda: exporter.config_set("maxmemory", 1),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                ask()


def test_doctor_finds_nothing_wrong(deployment: Running) -> None:
    await_that(lambda: deployment.parts.redis.exists(keys.MAINTENANCE))
    env = {"SLUICE_API_URL": deployment.nginx.url, "SSL_CERT_FILE": str(deployment.nginx.authority)}
    done = deployment.parts.sluice("doctor", "--json", **env)
    seen = Diagnosis(done.returncode, done.stdout)
    assert (seen.code, seen.wrong) == (0, set())
    assert f"{deployment.nginx.url} answers, and is ready" in seen.of("api", "ok")
    assert "rediss://" in seen.of("redis", "ok")


def test_prometheus_sees_every_api_and_every_worker(deployment: Running) -> None:
    def healthy() -> dict[str, int]:
        found = {job: deployment.prometheus.targets(job) for job in ("sluice-api", "sluice-worker")}
        return {job: sum(one["health"] == "up" for one in seen) for job, seen in found.items()}

    await_that(lambda: healthy() == {"sluice-api": 2, "sluice-worker": WORKERS}, explain=healthy)


@pytest.mark.parametrize("board", BOARDS)
def test_every_query_of_a_dashboard_answers(deployment: Running, board: str) -> None:
    asked = queries(board)
    answers = {panel: deployment.prometheus.query(query) for panel, query in asked.items()}
    assert answers.keys() == asked.keys()
    # Another engine's panels are empty.
    assert any(answers.values())


COMMANDS = re.findall(
    r"^docker compose (?:run --rm -T migrate|exec((?: -e \S+)*) api) sluice ([^>\n]+)",
    deploy_page.text(),
    re.MULTILINE,
)


@pytest.mark.parametrize(("settings", "command"), COMMANDS)
def test_a_command_of_the_page_works(deployment: Running, settings: str, command: str) -> None:
    parts, nginx = deployment.parts, deployment.nginx
    settings = settings.replace("https://llm.example.com", nginx.url)
    settings = settings.replace("/run/secrets", str(parts.secrets))
    env = dict(setting.split("=", 1) for setting in settings.replace("-e ", "").split())
    done = parts.sluice(*command.split(), **{"SLUICE_API_URL": parts.url} | env)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_commands_of_the_page_are_found() -> None:
    assert {command.split()[0] for _, command in COMMANDS} == {"keys", "doctor", "status"}
    assert any(settings for settings, _ in COMMANDS)


def test_the_pages_chat_streams(deployment: Running) -> None:
    places = {
        "secrets/ca": str(deployment.nginx.authority),
        "https://llm.example.com": deployment.nginx.url,
    }
    shown = deployment.run("curl --cacert", places)
    assert shown.startswith("data: {")
    assert shown.rstrip().endswith("data: [DONE]")


def test_the_pages_dump_has_the_tables(deployment: Running) -> None:
    location = make_url(deployment.parts.database_url).set(drivername="postgresql")
    url = location.render_as_string(hide_password=False)
    shipped = "docker compose exec -T postgres pg_dump --username sluice sluice"
    deployment.run(shipped, {shipped: f"{_program('pg_dump')} '{url}'"})
    dump = deployment.parts.home / "sluice.sql"
    assert "CREATE TABLE public.jobs " in dump.read_text()


def test_nginx_reads_another_certificate(deployment: Running, tmp_path: Path) -> None:
    parts, nginx = deployment.parts, deployment.nginx
    for name in ("ca", "ca_key"):
        shutil.copy(parts.secret(name), tmp_path)
    make_secrets.Secrets(tmp_path).write_certificates("localhost")
    shutil.copy(tmp_path / "tls_certificate", parts.home / "fullchain.pem")
    shutil.copy(tmp_path / "tls_key", parts.home / "privkey.pem")
    deployment.run("cp fullchain.pem", {})
    deployment.run("cp privkey.pem", {})
    reload = "docker compose exec nginx nginx"
    deployment.run(reload, {reload: f"nginx -c {nginx.config}"})
    renewed = (tmp_path / "tls_certificate").read_text().strip()
    address = "127.0.0.1", nginx.port
    await_that(lambda: ssl.get_server_certificate(address).strip() == renewed)
    assert deployment.get("/health/live").ok


def test_the_pages_try_arrives_at_the_second_receiver(deployment: Running) -> None:
    places = {
        "docker compose exec alertmanager ": "",
        "http://127.0.0.1:9093": deployment.alertmanager.url,
    }
    deployment.run("docker compose exec alertmanager amtool alert add", places)
    await_that(
        lambda: ("/warning", "SluiceTry") in deployment.received(), explain=deployment.received
    )


def test_who_is_on_call_sees_what_fires_and_silences_it(deployment: Running) -> None:
    """By commands alone, as no page of Prometheus or Alertmanager is published."""
    prometheus = {
        "docker compose exec prometheus ": "",
        "http://127.0.0.1:9090": deployment.prometheus.url,
    }
    deployment.run("docker compose exec prometheus promtool query", prometheus, "operations.md")
    alertmanager = {
        "docker compose exec alertmanager ": "",
        "http://127.0.0.1:9093": deployment.alertmanager.url,
    }
    silence = "docker compose exec alertmanager amtool silence"
    made = deployment.run(f"{silence} add", alertmanager, "operations.md")
    listed = deployment.run(f"{silence} query", alertmanager, "operations.md")
    assert made.strip() in listed
    assert "SluiceTtftP95" in listed


def test_an_alert_arrives(deployment: Running) -> None:
    """As the last: workers are stopped for it."""
    for worker in deployment.parts.workers:
        worker.stop()
    job = {"endpoint": "/v1/chat/completions", "body": {"messages": QUESTION}}
    accepted = requests.post(
        f"{deployment.nginx.url}/v1/jobs",
        json=job,
        headers={"Authorization": f"Bearer {deployment.key}"},
        verify=str(deployment.nginx.authority),
        timeout=60,
    )
    assert accepted.status_code == 202, accepted.text
    await_that(
        lambda: ("/critical", "SluiceNoWorker") in deployment.received(),
        explain=deployment.received,
    )
