"""Starts gunicorn with gevent, in place of the calling process."""

import ipaddress
import os
import re
import shutil
import socket
import sys
from typing import NoReturn

from sqlalchemy.exc import SQLAlchemyError

from api.connection_limits import KEPT_FILES
from db import migrate
from db.keys import any_key
from tasks.contract import open_files, processors
from tasks.contract.errors import ConfigurationError
from tasks.contract.models import get_catalog
from tasks.contract.settings import Settings, get_settings
from tasks.contract.trouble import database_trouble, refuse_lasting, refuse_unusable

MOST_FILES = 16_384
MOST_PROCESSES = 4
CORES_PER_PROCESS = 4
LOOPBACK_NAMES = "localhost,127.0.0.1,::1"


def serve(bind: str) -> NoReturn:
    """Replaces this process by gunicorn serving the API on HOST:PORT.

    gunicorn's gevent worker patches the standard library, which must happen before anything else is
    imported; a fresh process is the only one where that is so.

    Raises:
        SluiceError: what is set cannot work; checked here, before the exec.
    """
    get_catalog()
    settings = get_settings()
    refuse_unusable(settings)
    _allow_connections()
    try:
        migrate(settings.database_url)
    except SQLAlchemyError as failure:
        # Merely away: jobs in the background get 503 until it is back.
        refuse_lasting(database_trouble(failure, settings))
    else:
        refuse_open(bind, settings)
    _make_metrics_directory(bind)
    if not settings.allowed_hosts and is_loopback(bind.rpartition(":")[0]):
        os.environ["SLUICE_ALLOWED_HOSTS"] = LOOPBACK_NAMES
    processes = str(settings.api_processes or processes_for(processors.count()))
    # -P: what lies in the working directory is not ours.
    arguments = [bind, processes, str(settings.api_drain_s)]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "api.gunicorn_app", *arguments])


def processes_for(cores: int) -> int:
    """How many processes an API has, where no number of them is set.

    One relays the tokens of a GPU with a third of a core. Several keep the requests of a wave from
    waiting for each other; but each takes 100 MB, and connections to Redis and SQL, and workers
    send a message of its own to each one that listens.
    """
    return max(1, min(cores // CORES_PER_PROCESS, MOST_PROCESSES))


def is_open(bind: str, settings: Settings) -> bool:
    """Whether no key is needed there: there is none, and only this machine reaches it."""
    is_ours = is_loopback(bind.rpartition(":")[0])
    return is_ours and not settings.admin_key and not any_key(settings.database_url)


def refuse_open(bind: str, settings: Settings) -> None:
    """Refuses to serve other machines while there is no key.

    Raises:
        ConfigurationError: nobody could use it there, as nobody has a key.
        SQLAlchemyError: the database is away.
    """
    if is_loopback(bind.rpartition(":")[0]) or settings.admin_key:
        return
    if not any_key(settings.database_url):
        raise ConfigurationError(
            f"the API is to listen on {bind}, where other machines reach it, and there is no key; "
            "make one with `sluice keys create NAME`, set SLUICE_ADMIN_KEY, or bind it to 127.0.0.1"
        )


def _allow_connections() -> None:
    """As many as the system lets this user have."""
    files = open_files.allow(MOST_FILES)
    if files <= KEPT_FILES:
        raise ConfigurationError(
            f"a process may open {files} files, and the API needs {KEPT_FILES} and one more for "
            f"each connection; raise the hard limit (`ulimit -Hn {MOST_FILES}` as root, or "
            "LimitNOFILE= in its systemd unit, or `--ulimit nofile=` of its container)"
        )


def is_loopback(host: str) -> bool:
    """Whether who listens there is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _make_metrics_directory(bind: str) -> None:
    """An empty place for the numbers of this API's processes (metrics.py)."""
    # Other machines, or containers, may share the home.
    name = re.sub(r"[^\w.]", "-", f"{socket.gethostname()}-{bind}")
    directory = get_settings().home / "metrics" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
