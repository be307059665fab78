"""The containers of docker-compose.yml: each is given the secrets that it needs, and no others."""

from pathlib import Path

import yaml

from tasks.contract.settings import PREFIX, SECRET_FIELDS

SERVICES = yaml.safe_load(
    (Path(__file__).parent.parent / "docker-compose.yml").read_text(encoding="utf-8")
)["services"]
SECRETS = {f"{PREFIX}{name.upper()}" for name in SECRET_FIELDS}


def test_each_service_has_its_own_secrets_only() -> None:
    has = {
        name: SECRETS & service.get("environment", {}).keys() for name, service in SERVICES.items()
    }
    assert has == {
        "redis": set(),
        "api": {"SLUICE_ADMIN_KEY"},
        "maintenance": {"SLUICE_ALERT_WEBHOOK"},
        "worker": set(),
    }


def test_all_parts_share_the_queue_and_the_home() -> None:
    for name in ("api", "maintenance", "worker"):
        environment = SERVICES[name]["environment"]
        assert environment["SLUICE_REDIS_URL"] == "redis://redis:6379/0"
        assert environment["SLUICE_HOME"] == "/var/lib/sluice"
