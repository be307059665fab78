"""What is wrong with Redis, the database or a disk, and what to do: libraries' errors, translated.

`redis_trouble`, `database_trouble` and `disk_trouble` are used at the boundary of the program
(deploy/cli.py), by `sluice doctor`, and where a part starts.
"""

import errno
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from redis.exceptions import RedisError

from tasks.contract import tracing
from tasks.contract.connections import connect_once
from tasks.contract.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    DiskFullError,
    QueueUnavailableError,
    SluiceError,
)
from tasks.contract.settings import (
    PASSWORDS,
    PREFIX,
    SECRET_FIELDS,
    Settings,
    get_settings,
    without_password,
)
from tasks.contract.tracebacks import COMMAND

log = logging.getLogger(__name__)

REDIS_URLS = ("redis_url", "bus_url")
LEAST_SPACE_BYTES = 2**20

MORE_MEMORY = "give it a greater maxmemory, or shorten SLUICE_LOG_RETENTION_S"

SAME_HOME = "beside a `sluice up`, set SLUICE_HOME as it is there"
DELETE = "delete what is not needed there"
MAKE_ROOM = f"{DELETE}, or set SLUICE_HOME to a directory on another disk"


class Trouble(NamedTuple):
    """What is wrong, what to do about it, and as which error it is raised."""

    found: str
    do: str
    kind: type[SluiceError]

    @property
    def error(self) -> SluiceError:
        return self.kind(f"{self.found}; {self.do}")


class Case(NamedTuple):
    """The trouble behind the errors, as `TYPE: MESSAGE`, that match the pattern."""

    pattern: str
    found: str
    do: str
    kind: type[SluiceError]


# The first that matches; the last of each matches all.
REDIS = (
    Case(
        "^(Authentication|NoPermission)",
        "Redis at {url} refuses the user or the password ({reason})",
        "give {variable} a user and a password that may use all commands",
        ConfigurationError,
    ),
    Case(
        "^InvalidResponse",
        "what answers at {url} is no Redis ({reason})",
        "set {variable} to where Redis runs",
        ConfigurationError,
    ),
    Case(
        "CERTIFICATE_VERIFY_FAILED",
        "the certificate that Redis shows at {url} is refused ({reason})",
        "renew it if it has expired; if its authority is your own, end {variable} with "
        "?ssl_ca_certs=/PATH of that",
        ConfigurationError,
    ),
    Case(
        "DB index",
        "Redis at {url} has no database of that number ({reason})",
        "end {variable} with another one, as /0",
        ConfigurationError,
    ),
    Case(
        "^ReadOnly",
        "Redis at {url} is a replica, which takes no writes",
        "give {variable} the URL of its primary",
        QueueUnavailableError,
    ),
    Case(
        "^BusyLoading",
        "Redis at {url} is still loading its data",
        "wait until it has",
        QueueUnavailableError,
    ),
    Case(
        "MISCONF.*No space left",
        "Redis at {url} takes no writes: the disk of {directory}, on its machine, is full",
        f"{DELETE}; Redis then goes on by itself",
        QueueUnavailableError,
    ),
    Case(
        "MISCONF",
        "Redis at {url} takes no writes: it cannot save its data in {directory} ({reason})",
        "check its log, and the space and the permissions of that directory",
        QueueUnavailableError,
    ),
    Case(
        "^OutOfMemory|OOM command",
        "Redis at {url} takes no writes: all that its maxmemory allows is in use",
        MORE_MEMORY,
        QueueUnavailableError,
    ),
    Case(
        "^ResponseError",
        "Redis at {url} refuses a command ({reason})",
        "see that it is Redis 7.0 or newer and knows all commands",
        QueueUnavailableError,
    ),
    Case(
        "",
        "no Redis answers at {url} ({reason})",
        f"start it, or set {{variable}} to where it runs; {SAME_HOME}",
        QueueUnavailableError,
    ),
)
DATABASE = (
    Case(
        "^ArgumentError",
        "SLUICE_DATABASE_URL is no URL of SQLAlchemy's",
        "write it as postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME, odd characters as %XX, "
        "or sqlite:////PATH",
        ConfigurationError,
    ),
    Case(
        "^(Import|ModuleNotFound)Error",
        "there is no driver for {url} ({reason})",
        "install Sluice with its extra `postgres`",
        ConfigurationError,
    ),
    Case(
        "^CommandError",
        "the tables at {url} are of a version that this one does not know ({reason})",
        "update this installation to the version that made them",
        ConfigurationError,
    ),
    Case(
        "disk is full|No space left|disk I/O error",
        "the disk of the database at {url} is full ({reason})",
        DELETE,
        DiskFullError,
    ),
    Case(
        "no such table|relation .* does not exist",
        "the database at {url} has no tables",
        "start the API or maintenance once: they make them",
        DatabaseUnavailableError,
    ),
    Case(
        "password|role .* does not exist|no pg_hba.conf entry",
        "the database at {url} refuses the user or the password ({reason})",
        "give SLUICE_DATABASE_URL those that it knows",
        ConfigurationError,
    ),
    Case(
        "database .* does not exist",
        "there is no such database at {url} ({reason})",
        "make it with `createdb`, or name another one in SLUICE_DATABASE_URL",
        ConfigurationError,
    ),
    Case(
        "is not a database",
        "{url} is another kind of file",
        "name another file in SLUICE_DATABASE_URL: one that is not there is made",
        ConfigurationError,
    ),
    Case(
        "unable to open|readonly|read-only",
        "the database at {url} cannot be written ({reason})",
        "see that it and its directory are there and this user's, "
        "or set SLUICE_DATABASE_URL (SLUICE_HOME, without one) to another",
        ConfigurationError,
    ),
    Case(
        "^(Operational|Interface|Timeout)Error",
        "no database answers at {url} ({reason})",
        "start it, or set SLUICE_DATABASE_URL to where it runs",
        DatabaseUnavailableError,
    ),
    Case(
        "",
        "the database at {url} refuses a command ({reason})",
        "see its log; if that explains nothing, report this line",
        DatabaseUnavailableError,
    ),
)


def redis_trouble(failure: RedisError, settings: Settings) -> Trouble:
    """Why Redis failed a command. An error does not name the Redis: both are checked."""
    if trouble := ask_redis(settings):
        return trouble
    return judge_redis(failure, settings, "redis_url")


def ask_redis(settings: Settings, names: Iterable[str] = REDIS_URLS) -> Trouble | None:
    """The trouble with the first of these Redis that fails; None: they answer."""
    for name in names:
        try:
            with connect_once(getattr(settings, name)) as redis:
                redis.ping()
        except RedisError as failure:
            return judge_redis(failure, settings, name)
    return None


def judge_redis(failure: RedisError, settings: Settings, name: str) -> Trouble:
    """Why the Redis of that setting failed a command."""
    url = getattr(settings, name)
    directory = _directory(url) if "MISCONF" in str(failure) else ""
    words = {"variable": f"{PREFIX}{name.upper()}", "directory": directory}
    return _find(REDIS, failure, settings, url=without_password(url), **words)


def _directory(url: str) -> str:
    """Where that Redis keeps its data, if it is allowed to report it."""
    try:
        with connect_once(url) as redis:
            answer: Any = redis.config_get("dir")
            return str(answer["dir"])
    except RedisError:
        return "its data"


def database_trouble(failure: Exception, settings: Settings) -> Trouble:
    """Why the database, SQLAlchemy or Alembic failed."""
    return _find(DATABASE, failure, settings, url=without_password(settings.database_url))


def _find(cases: tuple[Case, ...], failure: Exception, settings: Settings, **words: str) -> Trouble:
    reason = explain(failure, settings)
    message = f"{type(failure).__name__}: {reason}"
    case = next(case for case in cases if re.search(case.pattern, message))
    words["reason"] = reason.rstrip(".")
    return Trouble(case.found.format(**words), case.do.format(**words), case.kind)


def explain(error: BaseException, settings: Settings) -> str:
    """The first line of a library's error message, without any of our secrets."""
    text = (COMMAND.sub("", str(error)) or type(error).__name__).splitlines()[0]
    for secret in sorted(_secrets(settings), key=len, reverse=True):
        text = text.replace(secret, "…")
    return text


def _secrets(settings: Settings) -> set[str]:
    urls = settings.redis_url, settings.bus_url, settings.database_url, settings.api_url
    found = {match[2] for url in urls for password in PASSWORDS for match in password.finditer(url)}
    found |= {getattr(settings, name) for name in SECRET_FIELDS} | set(settings.signing_secrets)
    return {form for secret in found if secret for form in (secret, unquote(secret))}


def disk_trouble(failure: OSError) -> Trouble:
    """Why a file or a directory cannot be used, or the system refuses something else."""
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        # A file that is open when its disk is full has no name any more.
        place = failure.filename or _full_place()
        return Trouble(f"the disk of {place} is full", MAKE_ROOM, DiskFullError)
    if not failure.filename:
        return Trouble(
            f"the system refuses what is asked of it ({failure})",
            "check this user's limits (`ulimit -a`), and the machine's memory and disks",
            ConfigurationError,
        )
    return Trouble(
        f"cannot use {failure.filename} ({failure.strerror})",
        "see that it is there and this user's, or set SLUICE_HOME to a directory of this user",
        ConfigurationError,
    )


def _full_place() -> Path | str:
    places = get_settings().home, Path(tempfile.gettempdir())
    return next((path for path in places if free_bytes(path) < LEAST_SPACE_BYTES), "a file")


def free_bytes(path: Path) -> int:
    """What this user may still write there, or where it would be made."""
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(there).free


def refuse_unwritable(home: Path) -> None:
    """Creates the state directory, and tests that it can be written.

    Raises:
        SluiceError: it cannot be made or written, or is full.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as probe:
            probe.write(bytes(LEAST_SPACE_BYTES))
    except OSError as refused:
        refused.filename = home
        raise disk_trouble(refused).error from None


def refuse_unusable(settings: Settings) -> None:
    """What every part checks before it starts: its home, and Redis, which may be away for now.

    Raises:
        SluiceError: the part could never work like that.
    """
    refuse_unwritable(settings.home)
    tracing.refuse_missing(settings)
    if trouble := ask_redis(settings):
        refuse_lasting(trouble)


def refuse_lasting(trouble: Trouble) -> None:
    """Raises trouble that will not pass; a server that is away is only logged as a warning."""
    if not issubclass(trouble.kind, (QueueUnavailableError, DatabaseUnavailableError)):
        raise trouble.error from None
    log.warning("%s", trouble.error)
