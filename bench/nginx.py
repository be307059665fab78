"""The shipped nginx on loopback: the files of docker-compose.yml, with other ports and paths."""

import getpass
import os
import shutil
import signal
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx
import orjson
import psutil

from bench.stack import Process, await_that
from deploy.redis_server import free_port

SHIPPED = Path(__file__).parent.parent / "deploy" / "nginx"
APIS = "server api:8000 resolve max_fails=1 fail_timeout=2s;"


class Nginx:
    """It runs inside its `with`, before the APIs on those ports; `secrets` as of `make secrets`."""

    def __init__(
        self,
        home: Path,
        secrets: Path,
        api_ports: Sequence[int],
        changes: Mapping[str, str] | None = None,
    ) -> None:
        self.home, self.secrets = home, secrets
        self.port, self.plain_port = free_port(), free_port()
        self.config = home / "nginx.conf"
        self.config.write_text(self._configuration(api_ports, changes or {}))
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def authority(self) -> Path:
        """Whose certificates its clients have to trust."""
        return self.secrets / "ca"

    def __enter__(self) -> Self:
        command = ["sh", str(SHIPPED / "start.sh")]
        self._process = Process(command, self.environment(), self.home / "nginx.log")
        try:
            await_that(self._answers)
        except BaseException:
            self._process.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process
        self._process.stop()

    def environment(self) -> dict[str, str]:
        """That of the script which starts it."""
        return os.environ | {
            "CERTIFICATE": str(self.secrets / "tls_certificate"),
            "CONFIG": str(self.config),
            "TEMPORARY": str(self.home),
            "HTTPS_PORT": str(self.port),
            # Where Debian has it.
            "PATH": f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin",
        }

    def check(self) -> subprocess.CompletedProcess[str]:
        """What `nginx -t` has to say about the configuration."""
        program = shutil.which("nginx", path=self.environment()["PATH"])
        assert program, "no nginx: `apt-get install nginx`"
        command = [program, "-t", "-c", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def reload(self) -> None:
        """Has new processes read the files; the old ones serve what they have begun."""
        assert self._process
        old = set(self._workers())
        self._process.signal(signal.SIGHUP)
        await_that(lambda: set(self._workers()) - old)

    def connections(self, port: int) -> int:
        """How many it has to that port."""
        open_ones = [one for worker in self._workers() for one in worker.net_connections()]
        return sum(bool(one.raddr) and one.raddr.port == port for one in open_ones)

    def access_log(self) -> list[dict[str, object]]:
        """A line for each request that has ended."""
        return [orjson.loads(line) for line in (self.home / "access.log").read_text().splitlines()]

    def log(self) -> str:
        """What it reports besides."""
        return (self.home / "nginx.log").read_text()

    def _configuration(self, api_ports: Sequence[int], changes: Mapping[str, str]) -> str:
        servers = [APIS.replace("api:8000 resolve", f"127.0.0.1:{port}") for port in api_ports]
        replaced = {
            "/tmp/": f"{self.home}/",
            "/var/cache/nginx/": f"{self.home}/",
            "/run/secrets/": f"{self.secrets}/",
            "/dev/stdout": f"{self.home}/access.log",
            APIS: "\n".join(servers),
            "listen 8080": f"listen 127.0.0.1:{self.plain_port}",
            "listen 8443": f"listen 127.0.0.1:{self.port}",
            # Root's files are for nobody else, not even for processes that root's nginx starts.
            "worker_processes 2;": f"worker_processes 2;\nuser {getpass.getuser()};",
            **changes,
        }
        text = (SHIPPED / "nginx.conf").read_text()
        for shipped, here in replaced.items():
            assert shipped in text, shipped
            text = text.replace(shipped, here)
        return text

    def _workers(self) -> list[psutil.Process]:
        assert self._process
        return psutil.Process(self._process.pid).children()

    def _answers(self) -> bool:
        assert self._process
        code = self._process.popen.poll()
        assert code is None, f"exit code {code}:\n{self.log()}"
        try:
            trusted = ssl.create_default_context(cafile=self.authority)
            with httpx.Client(verify=trusted, trust_env=False) as client:
                return client.get(f"{self.url}/health/live", timeout=5).is_success
        except httpx.TransportError:
            return False
