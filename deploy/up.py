"""`sluice up`: every part of Sluice on this machine, watched over until Ctrl-C."""

import os
import re
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import httpx
from redis.exceptions import RedisError
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text
from sqlalchemy import make_url

from api.server import is_open, refuse_open
from deploy import checks, log_files, redis_server
from deploy.process import Part, stop_all
from deploy.screen import welcome
from tasks.contract import keys, running, setting_files
from tasks.contract.connections import connect
from tasks.contract.errors import SluiceError
from tasks.contract.models import Catalog, Model, get_catalog
from tasks.contract.settings import IN_FILES, PREFIX, SECRET_FIELDS, Settings, get_settings
from tasks.queue import entries

LOG_LINES_SHOWN = 15
LOG_WIDTH = 110
PLAIN_PROGRESS_S = 10.0
FOLLOW_INTERVAL_S = 2.0
HEALTH_TIMEOUT_S = 3.0


# An engine runs other people's code, and needs none of these.
NOT_FOR_WORKERS = {f"{PREFIX}{name.upper()}" for name in (*SECRET_FIELDS, "database_url")}
# Other commands do not get these either: they find it by its home, and the URL follows from it.
NOT_ANNOUNCED = SECRET_FIELDS | {"home", "api_url"}
OPEN = (
    "The API is open: there is no key, so whoever is on this machine can use the models, and read "
    "and cancel every job; `sluice keys create NAME` ends that"
)


class StopRequested(Exception):  # noqa: N818 (it is none)
    """A signal asked to stop."""


def run(model: str | None, host: str | None, port: int | None, flags: tuple[str, ...]) -> int:
    """Runs all parts until a signal asks to stop; returns the exit code.

    What is given goes before the environment, and is what all parts find there.
    """
    chosen = {"MODEL": model, "HOST": host, "PORT": port, "MODEL_ARGS": shlex.join(flags) or None}
    setting_files.replace_in_environment(IN_FILES)
    os.environ |= {f"{PREFIX}{name}": str(value) for name, value in chosen.items() if value}
    settings, catalog = get_settings(), get_catalog()
    try:
        with checks.only_one(settings.home):
            checks.check_machine(settings, catalog)
            Deployment(settings, catalog).run()
    except SluiceError as wrong:
        print(f"sluice: {wrong}", file=sys.stderr)
        return 1
    return 0


class Deployment:
    """The parts that run, and what the user sees of them."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog
        # After Ctrl-C the worker's jobs are waited for, but not for long.
        self._env = {"SLUICE_DRAIN_S": "3", "PYTHONUNBUFFERED": "1", **os.environ}
        self._client = httpx.Client(
            base_url=settings.local_url,
            headers={"connection": "close"},
            timeout=HEALTH_TIMEOUT_S,
            trust_env=False,
        )
        self._console = Console(highlight=False, soft_wrap=True)
        self._announcement = ExitStack()
        self._redis: Part | None = None
        self._parts: list[Part] = []
        self._stopping = False

    def run(self) -> None:
        """Starts everything, shows how to use it, keeps it running, stops everything.

        Raises:
            StartError: a part ended while it started.
        """
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, self._request_stop)
        try:
            self._start_redis()
            self._migrate()
            self._announcement.enter_context(
                running.announced(self._settings.home, self._announced_settings())
            )
            self._start_parts()
            self._console.print(welcome(self._settings, self._catalog), markup=False)
            if is_open(self._settings.bind, self._settings):
                self._report(OPEN)
            self._supervise()
        except StopRequested:
            self._report("stopping")
        finally:
            started = time.monotonic()
            self._announcement.close()
            stop_all(self._parts, self._redis)
        self._report(f"stopped in {time.monotonic() - started:.1f} s")

    def _supervise(self) -> None:
        followed = 0.0
        while True:
            self._pause()
            for part in self._all():
                part.keep_alive(self._report)
            if time.monotonic() - followed > FOLLOW_INTERVAL_S:
                followed = time.monotonic()
                self._follow_worker()

    def _follow_worker(self) -> None:
        api, maintenance, worker, *others = self._parts
        if not others:
            for part in (self._redis, api, maintenance):
                if part:
                    part.follow(worker)

    def _start_redis(self) -> None:
        if "SLUICE_REDIS_URL" in os.environ:
            return
        server, port = redis_server.find_server(), redis_server.free_port()
        password = secrets.token_urlsafe(24)
        url = self._env["SLUICE_REDIS_URL"] = f"redis://:{password}@127.0.0.1:{port}/0"
        command = redis_server.server_command(server, self._settings.home, port, password)
        self._redis = self._part("redis", command)
        self._redis.start()
        self._wait("starting Redis", self._redis, lambda: redis_server.answers(url))
        # Killed workers of an earlier run must not pass for ours.
        connect(url).delete(keys.WORKERS)
        self._report(f"Redis: {server} on port {port}")

    def _migrate(self) -> None:
        from db import migrate

        migrate(self._settings.database_url)
        refuse_open(self._settings.bind, self._settings)

    def _announced_settings(self) -> dict[str, str]:
        """The environment of the parts, usable from any directory."""
        names = {f"{PREFIX}{name.upper()}": name for name in Settings.model_fields}
        given = {names[key]: value for key, value in self._env.items() if value and key in names}
        here = {"model": self._settings.model, "models": str(self._settings.models)}
        if "database_url" in given:
            url = make_url(given["database_url"])._replace(password=None)
            here["database_url"] = str(url.difference_update_query(["password"]))
        announced = given | {name: here[name] for name in here.keys() & given.keys()}
        return {name: announced[name] for name in announced.keys() - NOT_ANNOUNCED}

    def _start_parts(self) -> None:
        models = [model.name for model in self._read_models()]
        # -P: modules in the working directory are not ours.
        sluice = [sys.executable, "-P", "-m", "deploy.cli"]
        api = self._part("api", [*sluice, "api"])
        maintenance = self._part("maintenance", [*sluice, "maintenance"])
        env = {name: value for name, value in self._env.items() if name not in NOT_FOR_WORKERS}
        workers = [
            self._part(_worker_name(index, model), [*sluice, "worker", "--model", model], env)
            for index, model in enumerate(models)
        ]
        self._parts = [api, maintenance, *workers]
        for part in self._parts:
            part.start()
        started = time.monotonic()
        self._wait("starting the API", api, lambda: self._is_healthy("live"))
        self._report(f"API: answers after {time.monotonic() - started:.1f} s")
        self._wait(f"loading {models[0]}", workers[0], lambda: self._is_healthy("ready"))
        self._report(f"worker: serves after {time.monotonic() - started:.1f} s")

    def _read_models(self) -> list[Model]:
        """Those of models.yaml, and what was changed since, which workers find in Redis."""
        from db import model_entries

        found = model_entries.read(self._settings.database_url)
        try:
            entries.publish(connect(self._env["SLUICE_REDIS_URL"]), found)
        except RedisError as away:
            self._report(f"workers begin with models.yaml, Redis is away: {away}")
        return self._catalog.changed(entries.fitting(self._catalog, found)).models

    def _part(self, name: str, command: list[str], env: dict[str, str] | None = None) -> Part:
        log = self._settings.home / "logs" / f"{name}.log"
        log_files.begin(log)
        return Part(name, command, log, self._env if env is None else env)

    def _all(self) -> list[Part]:
        return [self._redis, *self._parts] if self._redis else self._parts

    def _is_healthy(self, what: str) -> bool:
        names = {"Host": self._settings.hosts[0]} if self._settings.hosts else {}
        try:
            return self._client.get(f"/health/{what}", headers=names).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _wait(self, doing: str, part: Part, is_done: Callable[[], bool]) -> None:
        """Waits, showing seconds and the last line of the part's log.

        Raises:
            StartError: a part ended.
        """
        started, shown = time.monotonic(), PLAIN_PROGRESS_S
        # Without its refresh thread: children are forked from this process.
        spinner = Spinner("dots")
        with Live(spinner, console=self._console, auto_refresh=False, transient=True) as live:
            while not is_done():
                self._pause()
                self._check_parts()
                seconds = time.monotonic() - started
                text = f"{doing} · {seconds:.0f} s · {''.join(part.log_tail(1))[:LOG_WIDTH]}"
                if self._console.is_terminal:
                    spinner.update(text=Text(text, no_wrap=True, overflow="ellipsis"))
                    live.refresh()
                elif seconds >= shown:
                    shown += PLAIN_PROGRESS_S
                    self._report(text)

    def _check_parts(self) -> None:
        for part in self._all():
            code = part.exit_code()
            if code is not None and (reason := part.reason()):
                raise checks.StartError(
                    f"{part.name} did not start: {reason} (its log: {part.log})"
                )
            if code is not None:
                tail = "\n  ".join(part.log_tail(LOG_LINES_SHOWN))
                raise checks.StartError(
                    f"{part.name} ended with exit code {code} while it started; "
                    f"the end of its log, {part.log}:\n  {tail}"
                )

    def _pause(self) -> None:
        time.sleep(0.1)
        if self._stopping:
            raise StopRequested
        for part in self._all():
            log_files.rotate(part.log, self._report)

    def _request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _report(self, text: str) -> None:
        self._console.print(text, markup=False)


def _worker_name(index: int, model: str) -> str:
    return "worker" if index == 0 else f"worker-{re.sub('[^A-Za-z0-9.-]+', '-', model)}"
