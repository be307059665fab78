"""A real Prometheus and a real Alertmanager on loopback, and the shipped configuration for them."""

import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Self

import requests

from bench.stack import Process, Stack, await_that
from deploy.redis_server import free_port

DEPLOY = Path(__file__).parent.parent / "deploy"
# Hurried, as `ship` leaves it.
API_DISCOVERY = "dns_sd_configs: [{names: [api], type: A, port: 8000, refresh_interval: 1s}]"


class Sample(NamedTuple):
    """One series of an instant query's result."""

    labels: dict[str, str]
    value: float


class Server:
    """A program that runs inside its `with`, its data beside its configuration."""

    def __init__(self, name: str, config: Path, *options: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.address}"
        listen = f"--web.listen-address={self.address}"
        command = [program(name), f"--config.file={config}", listen, "--log.level=warn", *options]
        self._process = Process(command, dict(os.environ), config.parent / f"{name}.log")

    def __enter__(self) -> Self:
        try:
            await_that(self._is_ready)
        except BaseException:
            self._process.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def get(self, path: str, **parameters: str) -> Any:
        """The JSON of its API.

        Raises:
            AssertionError: it refused, with its message.
        """
        answer = requests.get(f"{self.url}{path}", params=parameters, timeout=60)
        assert answer.ok, answer.text
        return answer.json()

    def _is_ready(self) -> bool:
        code = self._process.popen.poll()
        assert code is None, f"exit code {code}:\n{self._process.log.read_text()[-2000:]}"
        try:
            return requests.get(f"{self.url}/-/ready", timeout=2).ok
        except requests.RequestException:
            return False


class Prometheus(Server):
    """What it has scraped, evaluated and alerts on."""

    def __init__(self, config: Path) -> None:
        data = f"--storage.tsdb.path={config.parent / 'series'}"
        # 5 s by default.
        discovery = "--scrape.discovery-reload-interval=200ms"
        super().__init__("prometheus", config, data, discovery)

    def query(self, expression: str) -> list[Sample]:
        """What an expression gives now; a scalar comes as one sample without labels."""
        data = self.get("/api/v1/query", query=expression)["data"]
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(each["metric"], float(each["value"][1])) for each in data["result"]]

    def targets(self, job: str) -> list[dict[str, Any]]:
        """The targets of a scrape job, with `labels`, `health` and `lastError`."""
        active = self.get("/api/v1/targets", state="active")["data"]["activeTargets"]
        return [target for target in active if target["labels"]["job"] == job]

    def alerts(self, name: str) -> list[dict[str, Any]]:
        """The alerts of a name, with `labels`, `annotations` and `state` (pending, firing)."""
        found = self.get("/api/v1/alerts")["data"]["alerts"]
        return [alert for alert in found if alert["labels"]["alertname"] == name]


class Alertmanager(Server):
    """It calls the receivers of its configuration."""

    def __init__(self, config: Path) -> None:
        data = f"--storage.path={config.parent / 'notifications'}"
        super().__init__("prometheus-alertmanager", config, data, "--cluster.listen-address=")


def prometheus_config(
    directory: Path, stack: Stack, admin_key: str, alertmanager: str | None = None
) -> Path:
    """The shipped configuration and rules in that directory, hurried, for that stack.

    Without the address of an Alertmanager alerts reach nobody.
    """
    (directory / "admin_key").write_text(admin_key)
    apis = ", ".join(f'"127.0.0.1:{port}"' for port in stack.api_ports)
    places = {
        API_DISCOVERY: f"static_configs: [{{targets: [{apis}]}}]",
        "api:8000": f"127.0.0.1:{stack.api_ports[0]}",
        "alertmanager:9093": alertmanager or f"127.0.0.1:{free_port()}",
        "redis-exporter:9121": f"127.0.0.1:{free_port()}",
        "postgres-exporter:9187": f"127.0.0.1:{free_port()}",
        "/run/secrets/prometheus_key": "admin_key",
    }
    ship(DEPLOY / "prometheus" / "alerts.yml", directory, {})
    return ship(DEPLOY / "prometheus" / "prometheus.yml", directory, places)


def alertmanager_config(directory: Path, receiver: str) -> Path:
    """The shipped configuration in that directory, hurried, calling that receiver."""
    shipped = DEPLOY / "alertmanager" / "alertmanager.yml"
    return ship(shipped, directory, {"127.0.0.1:9099": receiver})


def ship(file: Path, directory: Path, places: dict[str, str]) -> Path:
    """A copy of a shipped file: other addresses and paths; minutes have become seconds."""
    text = re.sub(r"\b(\d+)([smh])\b", _hurried, file.read_text())
    for shipped, real in places.items():
        text = text.replace(shipped, real)
    copy = directory / file.name
    copy.write_text(text)
    return copy


def _hurried(duration: re.Match[str]) -> str:
    seconds = int(duration[1]) * {"s": 1, "m": 60, "h": 3600}[duration[2]]
    # Scrapes that come more often are too much for a busy machine.
    return f"{min(seconds, max(1, seconds // 60))}s"


def program(name: str) -> str:
    """The path of one of the programs.

    Raises:
        AssertionError: it is not installed.
    """
    found = shutil.which(name)
    assert found, f"no {name}: `apt-get install prometheus prometheus-alertmanager`"
    return found
