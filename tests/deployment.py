"""What docker-compose.yml runs, on loopback without containers, with the files that it mounts."""

import subprocess
import sys
from pathlib import Path

import psycopg
import redis
from sqlalchemy import make_url

from bench.stack import Process, Stack, await_that
from deploy import make_secrets
from tests.conftest import SIM
from tests.prometheus import DEPLOY, program


class Deployment(Stack):
    """Redis with TLS and a password, and parts whose secrets are in files."""

    def __init__(self, home: Path, database_url: str, **settings: object) -> None:
        super().__init__(home, [SIM], keep_alive_s=1, **settings)
        make_secrets.main("localhost", home)
        self.secrets = home / "secrets"
        self._sql = with_password(database_url, self.read("postgres_password"))
        self.secret("database_url").write_text(self._sql)
        # What is a name in the network of the containers is a port here.
        url = self.read("redis_url").replace("redis:6379", f"127.0.0.1:{self.redis_port}")
        self.redis_url = url.replace("/run/secrets", str(self.secrets))
        self.secret("redis_url").write_text(self.redis_url)
        self.redis = redis.Redis.from_url(self.redis_url)
        del self.env["SLUICE_REDIS_URL"]
        for name in ("redis_url", "database_url", "admin_key", "webhook_secrets"):
            self.env[f"SLUICE_{name.upper()}_FILE"] = str(self.secret(name))

    @property
    def database_url(self) -> str:
        return self._sql

    def secret(self, name: str) -> Path:
        return self.secrets / name

    def read(self, name: str) -> str:
        return self.secret(name).read_text().strip()

    def start_redis(self) -> Process:
        config = self.home / "redis.conf"
        shipped = (DEPLOY / "redis" / "redis.conf").read_text()
        text = shipped.replace("/run/secrets", str(self.secrets))
        text = text.replace("dir /data", f"dir {self.home / 'data' / 'redis'}")
        text = text.replace("tls-port 6379", f"bind 127.0.0.1\ntls-port {self.redis_port}")
        config.write_text(text)
        server = self._spawn("redis", [program("redis-server"), str(config)])
        # It answers those, too, who do not trust its certificate any more.
        await_that(lambda: "Ready to accept connections" in server.log.read_text())
        return server

    def sluice(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A command, run to its end with the same settings."""
        return subprocess.run(
            [sys.executable, "-m", "deploy.cli", *arguments],
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def create_key(self, name: str, role: str = "user") -> str:
        made = self.sluice("keys", "create", name, "--role", role)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def renew_certificates(self, days: int) -> None:
        """Has the certificates of Redis and nginx end in so many days."""
        for name in ("redis", "tls"):
            self.secret(f"{name}_certificate").unlink()
        make_secrets.Secrets(self.secrets).write_certificates("localhost", days)


def with_password(url: str, password: str) -> str:
    """The same new database, for an owner who has to show a password."""
    location = make_url(url)
    user = f"{location.database}_owner"
    plain = location.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        (path,) = connection.execute("SHOW hba_file").fetchone() or ("",)
        rules = Path(path).read_text()
        # The first that fits counts.
        Path(path).write_text(f"host all {user} 127.0.0.1/32 scram-sha-256\n{rules}")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{password}'")
        connection.execute(f"ALTER DATABASE {location.database} OWNER TO {user}")
    return location.set(username=user, password=password).render_as_string(hide_password=False)
