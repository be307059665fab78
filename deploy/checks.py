"""What must hold before `sluice up` starts anything; each failure explains how to fix it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil

from deploy.install import WITHOUT_VLLM
from gpu_worker.engines.sources import refuse_missing
from gpu_worker.orphans import refuse_orphans
from tasks.contract.errors import SluiceError
from tasks.contract.models import Catalog
from tasks.contract.settings import PREFIX, Settings
from tasks.contract.trouble import REDIS_URLS, ask_redis, refuse_unwritable

ENGINE_MEMORY_GIB = 2.0


class StartError(SluiceError):
    """Sluice cannot start here."""


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Holds the state directory for this `sluice up` alone.

    Raises:
        SluiceError: another one holds it, or it cannot be written.
    """
    refuse_unwritable(home)
    (home / "run").mkdir(exist_ok=True)
    (home / "logs").mkdir(exist_ok=True)
    with (home / "run" / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StartError(
                f"another `sluice up` (pid {lock.read()}) runs on {home}; stop it, "
                "or give this one its own SLUICE_HOME and SLUICE_PORT"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def check_machine(settings: Settings, catalog: Catalog) -> None:
    """Checks port, models, memory, engines left behind, and a configured Redis.

    Raises:
        SluiceError: something is missing or in the way.
    """
    _check_address(settings.host, settings.port)
    _check_models(catalog)
    refuse_orphans()
    configured = [name for name in REDIS_URLS if f"{PREFIX}{name.upper()}" in os.environ]
    if trouble := ask_redis(settings, configured):
        raise trouble.error


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as refused:
        raise StartError(
            f"cannot listen on port {port} of {host} ({refused.strerror}{listener(port)}); "
            f"free it, or choose another: `sluice up --port {port + 1}`, or SLUICE_PORT"
        ) from None


def listener(port: int) -> str:
    """The process that listens on the port, as far as this user may see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            is_listening = connection.status == psutil.CONN_LISTEN and connection.pid
            if is_listening and connection.laddr and connection.laddr.port == port:
                return f" by pid {connection.pid}, {psutil.Process(connection.pid).name()}"
    except psutil.Error:
        pass
    return ""


def _check_models(catalog: Catalog) -> None:
    on_vllm = [model for model in catalog.models if model.engine == "vllm"]
    if not on_vllm:
        return
    if find_spec("vllm") is None:
        raise StartError(
            f"vLLM is not installed, and the model {on_vllm[0].name} needs it; `make up` installs "
            f"it where it has a build; without it, {WITHOUT_VLLM}"
        )
    for model in on_vllm:
        refuse_missing(model)
    available = psutil.virtual_memory().available / 2**30
    if available < ENGINE_MEMORY_GIB * len(on_vllm):
        raise StartError(
            f"{available:.1f} GiB of memory are available, and {len(on_vllm)} vLLM engine(s) need "
            f"{ENGINE_MEMORY_GIB:.0f} GiB each; close other programs, or use SLUICE_MODEL=sim"
        )
