"""Every setting of Sluice: one frozen object, read from the environment in one place.

`SLUICE_REDIS_URL=redis://queue:6379/0 sluice api` and so on; docs/configuration.md has the table.
What is secret may be in a file instead, which `SLUICE_<FIELD>_FILE` names.
"""

import base64
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks.contract import running, setting_files
from tasks.contract.errors import ConfigurationError

PREFIX = "SLUICE_"

# Values that no error or log may show.
SECRET_FIELDS = frozenset({"webhook_secrets", "alert_webhook", "api_key", "admin_key"})
# Those, and URLs with passwords in them.
IN_FILES = {
    PREFIX + name.upper(): name
    for name in (*sorted(SECRET_FIELDS), "redis_url", "bus_url", "database_url")
}
FILE_VARIABLES = frozenset(name + setting_files.SUFFIX for name in IN_FILES)

HOME = Path("~/.sluice")
# A server bound to these is reached here.
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (compared only)
# In this order: `?password=`; `://user:password@` up to the last @, as people forget to escape.
PASSWORDS = re.compile(r"(?i)(password=)([^&]+)"), re.compile(r"(://[^:@/?]*:)(.+)(?=@)")

DATABASES = re.compile(r"(sqlite|postgresql(\+psycopg)?)://")


class Settings(BaseSettings):
    """Where the parts are and how long they wait; a field's variable is `SLUICE_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    redis_url: str = Field(
        "",
        description="the queue, and Celery's broker; empty: that of the `sluice up` that runs in "
        "`SLUICE_HOME`, else `redis://127.0.0.1:6379/0`; `sluice up` starts one of its own",
    )
    bus_url: str = Field(
        "", description="Redis for token logs and pub/sub; empty: the same as `SLUICE_REDIS_URL`"
    )
    database_url: str = Field(
        "",
        description="SQLAlchemy URL, for PostgreSQL `postgresql+psycopg://USER:PASSWORD@HOST/NAME`;"
        " empty: SQLite in `SLUICE_HOME`",
    )
    home: Path = Field(
        HOME,
        validate_default=True,
        description="state directory: database, logs, data of the embedded Redis",
    )
    models: Path | None = Field(
        None,
        description="path of `models.yaml`: name, source, aliases, engine with its arguments, and "
        "slots of each model; empty: the bundled demo model",
    )
    model: str = Field(
        "",
        description="another source for the first model: a Hub id, a directory, `sim`, or the URL "
        "of an OpenAI-compatible server",
    )
    model_args: str = Field(
        "",
        description="more arguments for its engine, as flags of `vllm serve`: "
        "`--max-model-len 4096`",
    )
    host: str = Field("127.0.0.1", min_length=1, description="address that the API listens on")
    port: int = Field(8000, ge=1, le=65535, description="port of the API")
    api_url: str = Field(
        "",
        description="API that `sluice submit`, `watch`, `job`, `jobs`, `cancel` and `bench` use; "
        "empty: the one on `SLUICE_HOST` and `SLUICE_PORT`",
    )
    api_key: str = Field("", description="bearer token that these commands send", repr=False)
    api_processes: int = Field(
        0, ge=0, description="gunicorn processes of one API; 0: one per four cores, four at most"
    )
    api_drain_s: int = Field(
        5, ge=5, description="how long a stopping API, which takes no new ones, lets streams go on"
    )

    allowed_hosts: str = Field(
        "",
        description="names that requests may be sent to, comma-separated; others get 403; behind "
        "a proxy: its name; empty: the names of loopback if the API is bound to it, else any",
    )
    allowed_origins: str = Field(
        "",
        description="origins whose web pages may use the API (CORS, WebSockets), as "
        "`https://chat.example.com`, comma-separated; `*`: all; empty: pages of this server only",
    )
    max_body_bytes: int = Field(
        10_000_000,
        ge=1,
        description="larger request bodies get 413; as many bytes may wait on one WebSocket",
    )
    max_schema_bytes: int = Field(
        100_000, ge=1, description="larger schemas, grammars and lists of tools get 400"
    )
    body_timeout_s: float = Field(
        60,
        gt=0,
        description="a request whose headers, or whose body, take longer to arrive gets 408",
    )
    max_answer_bytes: int = Field(
        100_000_000,
        ge=1,
        description="a job whose answer, or all events of its stream, is larger fails "
        "(`answer_too_large`); Redis takes up to 512 MB",
    )
    max_backlog: int = Field(
        10_000, ge=1, description="queued jobs per model and lane; more get 503"
    )
    max_backlog_bytes: int = Field(
        1_000_000_000,
        ge=1,
        description="bytes of the requests of a model's open jobs in Redis; more get 503",
    )
    request_timeout_s: float = Field(
        600, gt=0, description="a request that does not stream gets 504 after it"
    )
    keep_alive_s: float = Field(
        10, gt=0, le=10, description="between SSE comments on a silent stream, also while queued"
    )

    lease_s: float = Field(
        10, ge=3, description="a worker that is silent for so long loses its jobs to others"
    )
    reap_interval_s: float = Field(1, gt=0, description="between the reaper's rounds")
    max_attempts: int = Field(
        3,
        ge=1,
        description="failures of one job (its worker died, the engine answered 5xx) before it is "
        "given up",
    )
    engine_stall_s: float = Field(
        120,
        gt=0,
        description="an engine that has work and makes no step for so long counts as dead",
    )
    drain_s: float = Field(
        120,
        ge=0,
        description="how long a stopping worker lets running jobs finish; under `sluice up` 3, "
        "unless it is set",
    )
    job_retention_s: int = Field(
        2_592_000, ge=1, description="how long an ended job stays in SQL: 30 days"
    )
    job_ttl_s: int = Field(
        86_400,
        ge=60,
        description="a chat that nobody has begun by then expires; an `Idempotency-Key` is held "
        "in Redis for as long",
    )
    log_retention_s: int = Field(
        3600, ge=1, description="how long an ended job stays in Redis, from when SQL has it"
    )

    log_format: Literal["console", "json"] = Field(
        "console", description="how log lines look; `json`: one object per line"
    )
    log_content: bool = Field(False, description="log what is asked and answered, too")
    metrics_bind: str = Field(
        "127.0.0.1:0",
        pattern=r"^\S+:\d+$",
        description="`HOST:PORT` of a worker's `/metrics`; port 0: any free one",
    )
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="base URL of an OpenTelemetry receiver (OTLP over HTTP) that gets traces, as "
        "`http://collector:4318`; needs the extra `tracing`; empty: off",
    )

    alert_webhook: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        repr=False,
        description="URL that maintenance sends alerts to, in Alertmanager's form, without "
        "Prometheus; empty: off",
    )
    alert_depth: int = Field(
        1000, ge=1, description="more queued jobs of a model are such an alert"
    )
    alert_oldest_s: float = Field(
        60, gt=0, description="an interactive job that waits longer is such an alert"
    )

    admin_key: str = Field(
        "",
        repr=False,
        description="a key beside those that `sluice keys` makes, with role `admin` and tenant "
        "`default`; with it every request needs a key",
    )
    key_grace_s: float = Field(
        300,
        ge=5,
        description="how long keys that an API process knows are still taken while the database "
        "does not answer; others get 503 at once",
    )
    webhook_secrets: str = Field(
        "",
        repr=False,
        description="secrets that sign webhooks, `whsec_…`, comma-separated; each signs every "
        "call, so that one can replace another; empty: no webhooks",
    )
    webhook_allow_private: bool = Field(
        False, description="webhooks may call addresses that are not public"
    )
    webhook_ports: str = Field(
        "80, 443, 8000-8999",
        description="ports that webhooks may call, and ranges of them, comma-separated; others "
        "get 400",
    )

    @property
    def bind(self) -> str:
        """HOST:PORT of the API on this machine."""
        return _address(self.host, self.port)

    @property
    def local_url(self) -> str:
        """Where that API is reached from here."""
        return f"http://{_address(_EVERYWHERE.get(self.host, self.host), self.port)}"

    @property
    def signing_secrets(self) -> tuple[str, ...]:
        """The single secrets of `webhook_secrets`."""
        return _split(self.webhook_secrets)

    @property
    def webhook_port_ranges(self) -> tuple[range, ...]:
        """The single ports and ranges of `webhook_ports`."""
        return tuple(map(_port_range, _split(self.webhook_ports)))

    @property
    def hosts(self) -> tuple[str, ...]:
        """The single names of `allowed_hosts`, without brackets."""
        return tuple(name.lower().strip("[].") for name in _split(self.allowed_hosts))

    @property
    def origins(self) -> tuple[str, ...]:
        """The single origins of `allowed_origins`."""
        return tuple(origin.rstrip("/") for origin in _split(self.allowed_origins))

    @field_validator("redis_url", "bus_url")
    @classmethod
    def _check_redis_url(cls, url: str) -> str:
        if url:
            # Commands that never use Redis start without its library.
            from tasks.contract.connections import check_url

            check_url(url)
        return url

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, url: str) -> str:
        if url and not DATABASES.match(url):
            raise ValueError(
                "write it as sqlite:////PATH or, for PostgreSQL, "
                "postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME"
            )
        return url

    @field_validator("home")
    @classmethod
    def _find_home(cls, home: Path) -> Path:
        try:
            home = home.expanduser().absolute()
        except RuntimeError as unknown:
            raise ValueError("~ cannot be resolved here; give a path without it") from unknown
        there = next(path for path in (home, *home.parents) if path.exists())
        if not there.is_dir():
            which = "that" if there == home else f"{there}"
            raise ValueError(f"{which} is no directory; name one, which is made if it is not there")
        return home

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, key: str) -> str:
        # A file that a key is read from often ends with a line break.
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError("a header cannot hold it; give printable ASCII characters only")
        return key

    @field_validator("admin_key")
    @classmethod
    def _check_admin_key(cls, key: str) -> str:
        if key != key.strip() or not (key.isascii() and key.isprintable()):
            raise ValueError(
                "no header can hold it; give printable ASCII characters, "
                "without spaces or line breaks around them"
            )
        return key

    @field_validator("webhook_secrets")
    @classmethod
    def _check_secrets(cls, value: str) -> str:
        if not all(map(_is_webhook_secret, _split(value))):
            raise ValueError("a secret is `whsec_` and base64: whsec_$(openssl rand -base64 32)")
        return value

    @field_validator("webhook_ports")
    @classmethod
    def _check_ports(cls, value: str) -> str:
        ranges = [_port_range(ports) for ports in _split(value)]
        if not ranges or not all(r and r[0] > 0 and r[-1] < 2**16 for r in ranges):
            raise ValueError("give ports from 1 to 65535 or ranges of them: 80, 443, 8000-8999")
        return value

    @model_validator(mode="before")
    @classmethod
    def _join_running(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What is not given is as it is with the `sluice up` that runs in this home."""
        found = running.find(Path(os.path.expanduser(given.get("home", HOME))))
        if given.get("redis_url") not in {None, "", found.get("redis_url")}:
            return given  # another deployment is meant
        return {name: found[name] for name in found.keys() & cls.model_fields.keys()} | given

    @model_validator(mode="after")
    def _fill_defaults(self) -> Self:
        redis_url = self.redis_url or "redis://127.0.0.1:6379/0"
        derived = {
            "models": self.models and Path(os.path.abspath(os.path.expanduser(self.models))),
            "model": _absolute(self.model),
            "redis_url": redis_url,
            "bus_url": self.bus_url or redis_url,
            "api_url": self.api_url or self.local_url,
            "database_url": self.database_url or f"sqlite:///{self.home / 'sluice.db'}",
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        return self


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _absolute(source: str) -> str:
    """A model's source, wherever this is read: a directory's whole path, anything else as it is."""
    directory = os.path.abspath(os.path.expanduser(source))
    return directory if source and os.path.isdir(directory) else source


def without_password(url: str) -> str:
    """The URL as it may be shown, also one that cannot be parsed."""
    for password in PASSWORDS:
        url = password.sub(r"\1…", url)
    user, at, host = url.rpartition("@")
    # Without a scheme, or with a broken one.
    if at and "…" not in user and ":" in user.replace("://", "", 1):
        return f"…@{host}"
    return url


def _split(values: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, values.split(","))))


def _port_range(ports: str) -> range:
    """One port or FIRST-LAST; empty: it is neither."""
    if not re.fullmatch("[0-9]{1,5}(-[0-9]{1,5})?", ports):
        return range(0)
    first, _, last = ports.partition("-")
    return range(int(first), int(last or first) + 1)


def _is_webhook_secret(secret: str) -> bool:
    prefix, _, key = secret.partition("_")
    try:
        return prefix == "whsec" and bool(base64.b64decode(key, validate=True))
    except ValueError:
        return False


def _show(name: str, value: object) -> str:
    if name in SECRET_FIELDS:
        return "…"
    return repr(without_password(value) if isinstance(value, str) else value)


@cache
def get_settings() -> Settings:
    """The process's settings.

    Raises:
        ConfigurationError: a `SLUICE_` variable is unknown or its value is refused.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | FILE_VARIABLES
    unknown = sorted(key for key in os.environ if key.startswith(PREFIX) and key not in known)
    if unknown:
        names = ", ".join(sorted(known))
        raise ConfigurationError(f"unknown setting {', '.join(unknown)}; there are: {names}")
    from_files = setting_files.read_all(IN_FILES)
    given: dict[str, Any] = {IN_FILES[name]: value for name, value in from_files.items()}
    try:
        return Settings(**given)
    except ValidationError as refused:
        lines = [
            f"{PREFIX}{name.upper()}={_show(name, value)}: {message.removeprefix('Value error, ')}"
            for name, value, message in (
                ("_".join(map(str, error["loc"])), error["input"], error["msg"])
                for error in refused.errors()
            )
        ]
        raise ConfigurationError("; ".join(lines)) from None
