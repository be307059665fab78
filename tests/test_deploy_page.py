"""What docs/deploy.md says of secrets, passwords, backups and more GPUs works as it stands."""

import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from sqlalchemy import make_url

from bench.postgres import Postgres, _program
from db import get_engine
from tests import deploy_page
from tests.deployment import Deployment
from tests.test_compose import ROOT, SERVICES


@pytest.fixture
def parts(home: Path, postgres: Postgres) -> Iterator[Deployment]:
    """With its database alone; Redis can be started."""
    deployment = Deployment(home, postgres.create_database())
    assert deployment.sluice("migrate").returncode == 0
    yield deployment
    deployment.stop()
    get_engine(deployment.database_url).dispose()


def test_make_writes_the_secrets_of_a_domain(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    for name in ("Makefile", ".env.example", "deploy/make_secrets.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    first = deploy_page.run(deploy_page.command("make secrets DOMAIN="), {}, tmp_path)
    assert "redis_url" in first
    assert "\nDOMAIN=llm.example.com\n" in (tmp_path / ".env").read_text()
    # As after a file was deleted: the domain is known.
    assert "nothing was missing" in deploy_page.run("make secrets", {}, tmp_path)


def test_a_worker_of_a_second_gpu_has_composes_schema(tmp_path: Path) -> None:
    shown = textwrap.dedent(deploy_page.block("worker-1:")).replace("!override ", "")
    file = tmp_path / "docker-compose.override.yml"
    file.write_text(shown)
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    run = subprocess.run([*check, file], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    ((name, worker),) = yaml.safe_load(shown)["services"].items()
    assert name not in SERVICES
    assert worker["extends"] == {"file": "docker-compose.yml", "service": "worker"}
    reserved = worker["deploy"]["resources"]["reservations"]["devices"]
    shipped = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [shipped[0] | {"device_ids": ["1"]}]


def test_another_password_of_postgresql(parts: Deployment) -> None:
    location = make_url(parts.database_url)
    url = location.set(drivername="postgresql").render_as_string(hide_password=False)
    places = {
        "docker compose exec postgres psql --username sluice": f"{_program('psql')} '{url}'",
        "ROLE sluice": f"ROLE {location.username}",
    }
    shown = deploy_page.command("docker compose exec postgres psql")
    assert "ALTER ROLE" in deploy_page.run(shown, places, parts.home)
    refused = parts.sluice("migrate")
    assert "refuses the user or the password" in refused.stdout + refused.stderr
    new = location.set(password="NEW").render_as_string(hide_password=False)
    parts.secret("database_url").write_text(new)
    assert parts.sluice("migrate").returncode == 0


def test_a_backup_of_redis_is_made_while_it_runs_and_put_back(parts: Deployment) -> None:
    parts.start_redis()
    parts.redis.set("kept", "yes")
    places = {
        "docker compose exec -T redis sh": "sh",
        "/run/secrets": shlex.quote(str(parts.secrets)),
        "redis-cli": f"redis-cli -p {parts.redis_port}",
    }
    deploy_page.run(deploy_page.block("aof_rewrite_in_progress"), places, parts.home)
    name = "auto-aof-rewrite-percentage"
    assert parts.redis.config_get(name) == {name: "100"}
    parts.redis.set("kept", "no")
    parts.part("redis").stop()
    kept_in = parts.home / "data" / "redis" / "appendonlydir"
    shutil.rmtree(kept_in)
    shutil.copytree(parts.home / "backup", kept_in)
    parts.start_redis()
    assert parts.redis.get("kept") == b"yes"
