"""Settings whose values are in files; what is wrong with one is in test_bad_deployment.py."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.contract import setting_files
from tasks.contract.settings import IN_FILES, SECRET_FIELDS, get_settings


@pytest.fixture(autouse=True)
def read_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for variable in [name for name in os.environ if name.startswith("SLUICE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("SLUICE_HOME", str(tmp_path))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_a_value_is_what_the_file_holds_without_its_line_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "url").write_text("redis://:s3cret@queue:6379/1\n")
    monkeypatch.setenv("SLUICE_REDIS_URL_FILE", str(tmp_path / "url"))
    settings = get_settings()
    assert settings.redis_url == settings.bus_url == "redis://:s3cret@queue:6379/1"


def test_every_secret_may_be_in_a_file() -> None:
    assert set(IN_FILES.values()) >= SECRET_FIELDS | {"redis_url", "bus_url", "database_url"}


def test_who_starts_parts_has_the_values_instead_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sluice up` leaves workers without some: it does so by the names of the values."""
    (tmp_path / "key").write_text("s3cret-of-the-admin")
    monkeypatch.setenv("SLUICE_ADMIN_KEY_FILE", str(tmp_path / "key"))
    # So that it is taken away again.
    monkeypatch.setenv("SLUICE_ADMIN_KEY", "")
    setting_files.replace_in_environment(IN_FILES)
    assert os.environ["SLUICE_ADMIN_KEY"] == "s3cret-of-the-admin"
    assert "SLUICE_ADMIN_KEY_FILE" not in os.environ
    assert get_settings().admin_key == "s3cret-of-the-admin"
