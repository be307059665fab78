"""docker-compose.yml and what belongs to it: what is open, what is secret, what is pinned."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.nginx import Nginx
from deploy import make_secrets
from deploy.redis_server import free_port
from tasks.contract.settings import FILE_VARIABLES, PREFIX, Settings
from tests.prometheus import DEPLOY, program

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docker-compose.yml"
COMPOSE = yaml.safe_load(FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {"api", "maintenance", "migrate", "worker", "worker-cpu"}
IN_CONTAINERS = "/run/secrets/"
FOR_REDIS = {"redis_url", "ca"}


def environment(name: str) -> dict[str, str]:
    return dict(SERVICES[name].get("environment", {}))


def mounted() -> list[str]:
    """What services get from this directory: files and directories by their paths in it."""
    volumes = [volume for service in SERVICES.values() for volume in service.get("volumes", [])]
    return [v["source"] if isinstance(v, dict) else v.partition(":")[0] for v in volumes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which `make secrets` has run."""
    root = tmp_path_factory.mktemp("made")
    make_secrets.main("llm.example.com", root)
    return root


def test_the_file_has_composes_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    run = subprocess.run([*check, FILE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_only_nginx_is_published_and_only_it_is_where_clients_are() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"nginx"}
    assert {name for name, of in SERVICES.items() if "edge" in of["networks"]} == {"nginx"}
    networks = COMPOSE["networks"]
    leading_out = {
        name for name, network in networks.items() if not (network or {}).get("internal")
    }
    assert leading_out == {"edge", "egress", "calls"}
    for store in ("redis", "postgres"):
        assert not leading_out & set(SERVICES[store]["networks"])


def test_no_worker_reaches_alertmanager_the_database_or_grafana() -> None:
    for worker in ("worker", "worker-cpu"):
        for other in ("alertmanager", "postgres", "grafana", "postgres-exporter", "nginx"):
            assert not set(SERVICES[worker]["networks"]) & set(SERVICES[other]["networks"]), other


def test_each_service_has_its_own_secrets_only() -> None:
    has = {name: set(service.get("secrets", [])) for name, service in SERVICES.items()}
    assert has == {
        "nginx": {"tls_certificate", "tls_key"},
        "api": {*FOR_REDIS, "database_url", "admin_key", "webhook_secrets"},
        "maintenance": {*FOR_REDIS, "database_url", "webhook_secrets"},
        "migrate": {*FOR_REDIS, "database_url"},
        "worker": FOR_REDIS,
        "worker-cpu": FOR_REDIS,
        "redis": {"redis_users", "redis_password", "redis_certificate", "redis_key", "ca"},
        "postgres": {"postgres_admin", "postgres_password", "postgres_exporter"},
        "prometheus": {"prometheus_key"},
        "alertmanager": set(),
        "grafana": {"grafana_password"},
        "redis-exporter": {"redis_exporter", "ca"},
        "postgres-exporter": {"postgres_exporter"},
    }


def test_every_password_comes_from_a_file_that_its_service_has() -> None:
    for name, service in SERVICES.items():
        for variable, value in environment(name).items():
            if re.search("PASSWORD|PASS_|SECRET|ADMIN_KEY|URL_FILE|CA_CERT", variable):
                secret = str(value).removeprefix(IN_CONTAINERS)
                assert variable.endswith("_FILE"), (name, variable)
                assert secret in service["secrets"], (name, variable)
    assert not re.search(r"://\w*:[^@/\s]+@", FILE.read_text())


def test_our_parts_are_given_settings_that_there_are() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | FILE_VARIABLES
    for name in OURS:
        given = {variable for variable in environment(name) if variable.startswith(PREFIX)}
        assert given <= known
        assert environment(name)["SLUICE_REDIS_URL_FILE"] == "/run/secrets/redis_url"
        # What .env does not have; the file need not be there.
        assert SERVICES[name]["env_file"] == [{"path": "sluice.env", "required": False}]
        assert "/etc/sluice" in {volume["target"] for volume in SERVICES[name]["volumes"]}


def test_the_state_directory_is_their_users_alone(made: Path) -> None:
    """`sluice doctor` warns where others can look into it."""
    for name in ("api", "maintenance", "migrate"):
        # Made by whoever comes first, with mode 700.
        assert environment(name)["SLUICE_HOME"] == "/tmp/sluice"
        assert SERVICES[name]["tmpfs"] == ["/tmp:mode=1777"]
    for name in ("worker", "worker-cpu"):
        home = environment(name)["SLUICE_HOME"]
        (kept,) = [each["source"] for each in SERVICES[name]["volumes"] if each["target"] == home]
        assert stat.S_IMODE((made / kept).stat().st_mode) == 0o700


def test_bodies_wait_on_a_disk() -> None:
    """What a tmpfs holds counts as memory of the container."""
    volumes = SERVICES["nginx"]["volumes"]
    kept = {volume["target"] for volume in volumes if isinstance(volume, dict)}
    config = (DEPLOY / "nginx" / "nginx.conf").read_text()
    (path,) = re.findall(r"client_body_temp_path (\S+);", config)
    assert str(Path(path).parent) in kept
    # A process for each processor that it may use, of however many there are.
    cpus = SERVICES["nginx"]["deploy"]["resources"]["limits"]["cpus"]
    assert f"\nworker_processes {cpus};" in config


def test_whoever_chooses_another_port_is_sent_there() -> None:
    assert environment("nginx")["HTTPS_PORT"] == "${HTTPS_PORT:-443}"
    assert "}:${HTTPS_PORT:-443}/grafana/" in environment("grafana")["GF_SERVER_ROOT_URL"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined_watched_and_started_again(name: str) -> None:
    service = SERVICES[name]
    assert service["user"].startswith("${OWNER:?")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["deploy"]["resources"]["limits"]["memory"]
    if name == "migrate":
        assert service["restart"] == "no"
        return
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"]


def test_two_of_what_must_not_end_and_a_gpu_for_the_worker() -> None:
    replicas = {name: of["deploy"].get("replicas") for name, of in SERVICES.items()}
    assert (replicas["api"], replicas["maintenance"]) == (2, 2)
    (gpu,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (gpu["driver"], gpu["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["device_ids"] == ["${GPU:-0}"]
    assert SERVICES["worker"]["profiles"] == ["gpu"]
    assert SERVICES["worker-cpu"]["profiles"] == ["cpu"]


def test_redis_has_more_memory_than_it_uses() -> None:
    config = (DEPLOY / "redis" / "redis.conf").read_text()
    assert "\nmaxmemory 2gb\n" in config
    assert SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"] == "4g"


def test_images_of_others_are_pinned_by_tag_and_by_digest_if_one_is_set() -> None:
    for name in SERVICES.keys() - OURS:
        variable = f"{name.upper().replace('-', '_')}_DIGEST"
        pinned = rf"[\w./-]+:v?\d+\.\d+[\w.-]*\$\{{{variable}:\+@\$\{{{variable}\}}\}}"
        assert re.fullmatch(pinned, SERVICES[name]["image"])
    targets = {name: SERVICES[name]["build"]["target"] for name in OURS}
    assert set(targets.values()) == {"api", "worker", "worker-gpu"}


def test_images_are_built_on_what_the_dockerfile_names_and_a_digest_if_one_is_set() -> None:
    asked = re.findall(r"^ARG (\w+)(?:=(.*))?$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    defaults = dict(asked)
    for name in OURS:
        given = SERVICES[name]["build"]["args"]
        assert given.keys() == defaults.keys()
        for base in ("PYTHON", "VLLM"):
            assert given[base] == f"{defaults[base]}${{{base}_DIGEST:+@${{{base}_DIGEST}}}}"
        assert given["VERSION"].startswith("${VERSION:?")
        assert given["REVISION"] == "${REVISION:-unknown}"


def test_what_the_file_asks_for_is_in_the_example_of_env() -> None:
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", FILE.read_text()))
    lines = (ROOT / ".env.example").read_text().splitlines()
    offered = {line.partition("=")[0] for line in lines if not line.startswith("#")}
    assert asked <= offered
    assert offered - asked == {"COMPOSE_PROFILES"}


def test_what_is_mounted_is_there_or_made(made: Path) -> None:
    for path in mounted():
        where = made if path.startswith("./data") else ROOT
        assert (where / path).exists(), path
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
        assert (made / "secrets" / name).exists(), name


def test_secrets_are_written_once_and_for_their_owner_alone(made: Path) -> None:
    files = sorted((made / "secrets").iterdir())
    before = [file.read_bytes() for file in files]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((made / "secrets").stat().st_mode) == 0o700
    make_secrets.main("", made)
    assert sorted((made / "secrets").iterdir()) == files
    assert [file.read_bytes() for file in files] == before
    assert "\nDOMAIN=llm.example.com\n" in (made / ".env").read_text()
    assert not any(name in (made / ".env").read_text() for name in ("SECRET", "PASSWORD", "KEY"))


def test_two_installations_have_nothing_in_common(made: Path, tmp_path: Path) -> None:
    make_secrets.main("llm.example.com", tmp_path)
    for file in (made / "secrets").iterdir():
        if file.name != "prometheus_key":  # empty, until there is a database
            assert file.read_bytes() != (tmp_path / "secrets" / file.name).read_bytes()


def test_a_lost_form_of_a_password_is_made_of_it(made: Path) -> None:
    url = made / "secrets" / "redis_url"
    before = url.read_text()
    url.unlink()
    make_secrets.main("llm.example.com", made)
    assert url.read_text() == before
    # By the user and the address that the exporter has in its environment.
    password = (made / "secrets" / "redis_exporter_password").read_text()
    exporter = json.loads((made / "secrets" / "redis_exporter").read_text())
    scheme, _, address = environment("redis-exporter")["REDIS_ADDR"].partition("://")
    user = environment("redis-exporter")["REDIS_USER"]
    assert exporter == {f"{scheme}://{user}@{address}": password}


def test_containers_run_as_the_owner_of_the_files_and_never_as_root(made: Path) -> None:
    user, group = (10001, 10001) if os.getuid() == 0 else (os.getuid(), os.getgid())
    assert f"\nOWNER={user}:{group}\n" in (made / ".env").read_text()
    directories = [made / "secrets", made / "data"]
    files = [*directories, *(path for directory in directories for path in directory.iterdir())]
    assert {(file.stat().st_uid, file.stat().st_gid) for file in files} == {(user, group)}


def refusal(root: Path, domain: str = "") -> str:
    """The sentence with which `make secrets` ends; it has changed nothing."""
    before = {file.name: file.read_bytes() for file in (root / "secrets").iterdir()}
    with pytest.raises(SystemExit) as ended:
        make_secrets.main(domain, root)
    assert {file.name: file.read_bytes() for file in (root / "secrets").iterdir()} == before
    return str(ended.value)


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_containers_as_root_are_refused(tmp_path: Path) -> None:
    make_secrets.main("localhost", tmp_path)
    env = tmp_path / ".env"
    env.write_text(re.sub("OWNER=.*", "OWNER=0:0", env.read_text()))
    assert "OWNER=0:0 in .env: containers without capabilities" in refusal(tmp_path)


def test_another_domain_is_not_taken_silently(tmp_path: Path) -> None:
    make_secrets.main("llm.example.com", tmp_path)
    assert "DOMAIN=llm.example.com in .env" in refusal(tmp_path, "10.0.0.7")
    replace(tmp_path / ".env", "llm.example.com", "10.0.0.7")
    said = refusal(tmp_path)
    assert "secrets/tls_certificate is not for 10.0.0.7" in said
    for name in ("tls_certificate", "tls_key"):
        assert f"secrets/{name}" in said
        (tmp_path / "secrets" / name).unlink()
    make_secrets.main("", tmp_path)
    shown = ["openssl", "x509", "-in", tmp_path / "secrets" / "tls_certificate", "-noout", "-text"]
    text = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert "IP Address:10.0.0.7, DNS:localhost, IP Address:127.0.0.1" in text


@pytest.mark.parametrize(
    ("base", "made_of_it"),
    [
        ("postgres_password", ["database_url"]),
        ("redis_password", ["redis_users", "redis_url"]),
        ("redis_exporter_password", ["redis_users", "redis_exporter"]),
        ("ca", ["redis_certificate", "redis_key", "tls_certificate", "tls_key"]),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, base: str, made_of_it: list[str]
) -> None:
    make_secrets.main("localhost", tmp_path)
    secrets = tmp_path / "secrets"
    before = (secrets / base).read_bytes()
    (secrets / base).unlink()
    said = refusal(tmp_path)
    assert f"secrets/{base} is gone" in said
    for name in made_of_it:
        assert f"secrets/{name}" in said
        (secrets / name).unlink()
    make_secrets.main("", tmp_path)
    assert (secrets / base).read_bytes() != before
    assert all((secrets / name).exists() for name in made_of_it)


def test_a_password_of_ones_own_is_not_taken_beside_forms_of_another(tmp_path: Path) -> None:
    make_secrets.main("localhost", tmp_path)
    (tmp_path / "secrets" / "redis_password").write_text("chosen")
    said = refusal(tmp_path)
    assert "secrets/redis_password is another one" in said
    assert "chosen" not in said


@pytest.mark.parametrize(
    "command",
    [
        "promtool check config --syntax-only prometheus/prometheus.yml",
        "promtool check rules prometheus/alerts.yml",
        "amtool check-config alertmanager/alertmanager.yml",
        "sh -n nginx/start.sh",
        "sh -n postgres/roles.sh",
    ],
)
def test_a_mounted_file_passes_its_own_check(command: str) -> None:
    checker, *arguments = command.split()
    check = [program(checker), *arguments]
    run = subprocess.run(check, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_nginx_takes_its_configuration(made: Path, tmp_path: Path) -> None:
    checked = Nginx(tmp_path, made / "secrets", [free_port(), free_port()]).check()
    assert checked.returncode == 0, checked.stderr


def test_grafana_finds_data_source_and_dashboards() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "sluice.yaml").read_text())[
        "providers"
    ]
    mounts = [volume for volume in SERVICES["grafana"]["volumes"] if isinstance(volume, str)]
    assert mounts == [f"./deploy/grafana:{provider['options']['path']}:ro"]
    set_up = environment("grafana")
    assert set_up["GF_PATHS_PROVISIONING"] == f"{provider['options']['path']}/provisioning"
