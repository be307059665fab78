"""What is wrong with a deployment stops the part with a sentence, and `sluice doctor` finds it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.nginx import SHIPPED, Nginx
from bench.postgres import Postgres
from bench.stack import await_that, running
from db import get_engine
from deploy.redis_server import free_port
from tasks.contract import keys
from tests.deployment import Deployment
from tests.test_compose import SERVICES
from tests.test_doctor import Diagnosis
from tests.test_doctor_database import go_back, go_beyond

PARTS = [["api", "--bind", "127.0.0.1:0"], ["worker"], ["maintenance"]]
FILES = ("admin_key", "redis_url", "database_url", "webhook_secrets")


@pytest.fixture
def deployment(home: Path, postgres: Postgres) -> Iterator[Deployment]:
    """With Redis alone; its database is at this version."""
    parts = Deployment(home, postgres.create_database())
    assert parts.sluice("migrate").returncode == 0
    yield parts
    parts.stop()
    get_engine(parts.database_url).dispose()


def sentence(parts: Deployment, *command: str, **env: str) -> str:
    """The one with which a part has ended; nothing secret is in it."""
    done = parts.sluice(*command, **env)
    assert done.returncode in {1, 2}, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert not [
        name for name in ("redis_password", "postgres_password") if parts.read(name) in said
    ]
    return said


def diagnose(parts: Deployment, **env: str) -> Diagnosis:
    done = parts.sluice("doctor", "--json", **env)
    return Diagnosis(done.returncode, done.stdout)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part[0])
def test_a_wrong_password_of_redis(deployment: Deployment, part: list[str]) -> None:
    deployment.start_redis()
    right = deployment.read("redis_password")
    url = deployment.redis_url.replace(right, "guessed")
    deployment.secret("redis_url").write_text(url)
    said = sentence(deployment, *part)
    assert "refuses the user or the password" in said
    assert "SLUICE_REDIS_URL" in said
    seen = diagnose(deployment)
    assert seen.code == 1
    assert "refuses the user or the password" in seen.of("redis", "wrong")


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part[0])
def test_an_expired_certificate_of_redis(deployment: Deployment, part: list[str]) -> None:
    deployment.renew_certificates(days=0)
    deployment.start_redis()
    said = sentence(deployment, *part)
    assert "the certificate that Redis shows" in said
    assert "certificate has expired" in said
    seen = diagnose(deployment)
    assert seen.code == 1
    assert "certificate has expired" in seen.of("redis", "wrong")
    assert "renew it" in seen.of("redis", "wrong")


def test_redis_is_healthy_with_an_expired_certificate_so_that_the_parts_can_say_it(
    deployment: Deployment,
) -> None:
    deployment.renew_certificates(days=0)
    deployment.start_redis()
    _, check = SERVICES["redis"]["healthcheck"]["test"]
    places = {
        "$$": "$",
        "/run/secrets": str(deployment.secrets),
        "redis-cli": f"redis-cli -p {deployment.redis_port}",
    }
    for shipped, here in places.items():
        assert shipped in check
        check = check.replace(shipped, here)
    done = subprocess.run(["sh", "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_certificate_of_redis_that_soon_ends(deployment: Deployment) -> None:
    deployment.renew_certificates(days=22)
    deployment.start_redis()
    assert "certificate" not in diagnose(deployment).of("redis", "warning")
    deployment.part("redis").stop()
    deployment.renew_certificates(days=20)
    deployment.start_redis()
    seen = diagnose(deployment)
    assert "redis" not in seen.wrong
    assert "ends in 20 day(s)" in seen.of("redis", "warning")


def test_a_certificate_of_an_authority_that_nobody_knows(deployment: Deployment) -> None:
    deployment.start_redis()
    deployment.secret("redis_url").write_text(deployment.redis_url.partition("?")[0])
    said = sentence(deployment, "worker")
    assert "end SLUICE_REDIS_URL with ?ssl_ca_certs=/PATH" in said


def test_a_wrong_password_of_the_database(deployment: Deployment) -> None:
    deployment.start_redis()
    right = deployment.read("postgres_password")
    url = deployment.database_url.replace(right, "guessed")
    deployment.secret("database_url").write_text(url)
    for command in (["migrate"], PARTS[0]):
        assert "refuses the user or the password" in sentence(deployment, *command)
    assert "database" in diagnose(deployment).wrong


def test_a_database_of_an_older_schema_is_found_and_brought_up_to_date(
    deployment: Deployment,
) -> None:
    go_back(deployment.database_url)
    assert "and this version needs" in diagnose(deployment).of("database", "wrong")
    assert deployment.sluice("migrate").returncode == 0
    assert "answers, at migration" in diagnose(deployment).of("database", "ok")


def test_a_database_of_a_newer_schema_stops_who_would_change_it(deployment: Deployment) -> None:
    deployment.start_redis()
    go_beyond(deployment.database_url)
    for command in (["migrate"], PARTS[0]):
        said = sentence(deployment, *command)
        assert "are of a version that this one does not know" in said
    assert "does not know" in diagnose(deployment).of("database", "wrong")


@pytest.mark.parametrize("name", FILES)
def test_a_secret_that_is_missing_empty_or_given_twice(deployment: Deployment, name: str) -> None:
    variable = f"SLUICE_{name.upper()}"
    file = deployment.secret(name)
    said = sentence(deployment, "doctor", **{variable: file.read_text()})
    assert f"{variable} and {variable}_FILE are both set" in said
    file.write_text("\n")
    assert f"{variable}_FILE={file} is empty" in sentence(deployment, "doctor")
    file.unlink()
    said = sentence(deployment, "doctor")
    assert f"{variable}_FILE={file} cannot be read (No such file or directory)" in said


def test_nginx_does_not_start_with_an_expired_certificate(deployment: Deployment) -> None:
    deployment.renew_certificates(days=0)
    said = start_nginx(deployment)
    assert f"certificate in {deployment.secret('tls_certificate')} has expired" in said
    assert "put another one there" in said


def test_nginx_does_not_start_with_what_is_no_certificate(deployment: Deployment) -> None:
    deployment.secret("tls_certificate").write_text("none")
    assert "has expired, or is none" in start_nginx(deployment)


def test_nginx_does_not_start_with_a_certificate_that_it_cannot_read(
    deployment: Deployment,
) -> None:
    # Root reads all files, but none that is not there.
    deployment.secret("tls_certificate").unlink()
    said = start_nginx(deployment)
    assert f"{deployment.secret('tls_certificate')} cannot be read by user" in said
    assert "expired" not in said


def start_nginx(parts: Deployment) -> str:
    """What is reported where it does not start."""
    env = Nginx(parts.home, parts.secrets, [free_port()]).environment()
    command = ["sh", SHIPPED / "start.sh"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def test_doctor_finds_that_the_certificate_of_nginx_ends_and_has_ended(
    home: Path, postgres: Postgres
) -> None:
    parts = Deployment(home, postgres.create_database())
    with running(parts), Nginx(home, parts.secrets, parts.api_ports) as nginx:
        env = {"SLUICE_API_URL": nginx.url, "SSL_CERT_FILE": str(nginx.authority)}
        await_that(lambda: parts.redis.exists(keys.MAINTENANCE))
        assert diagnose(parts, **env).wrong == set()
        # Redis has read its own already.
        parts.renew_certificates(days=20)
        nginx.reload()
        seen = diagnose(parts, **env)
        assert (seen.code, seen.of("redis", "warning")) == (0, "")
        assert "ends in 20 day(s)" in seen.of("api", "warning")
        parts.renew_certificates(days=0)
        nginx.reload()
        seen = diagnose(parts, **env)
        assert seen.wrong == {"api"}
        assert "certificate has expired" in seen.of("api", "wrong")
        assert "renew it if it has expired" in seen.of("api", "wrong")
    get_engine(parts.database_url).dispose()
