"""Checks of Sluice's own parts and of this machine."""

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import httpx

from deploy.checks import listener
from deploy.doctor_servers import judge, warn_of_end
from deploy.findings import Remark, UnusableError, ok, warning, wrong
from gpu_worker.engines.sources import refuse_missing
from tasks.contract import keys, running
from tasks.contract.connections import connect_once
from tasks.contract.errors import NoWorkerError, SluiceError
from tasks.contract.models import BUILT_IN, get_catalog
from tasks.contract.settings import PREFIX, Settings, without_password
from tasks.contract.trouble import MAKE_ROOM, explain, free_bytes
from tasks.queue.backlog import Backlog
from tasks.queue.problems import Problem, find_problems, start_worker
from tasks.queue.statistics import ModelStats, QueueStats, read_stats

API_TIMEOUT_S = 3.0
# A record may wait for 30 s for the end of its job's log (tasks/maintenance/ledger.py).
OLD_RECORD_S = 60.0
LITTLE_DISK_BYTES = 2**30
NO_DISK_BYTES = 100 * 2**20
FEW_OPEN_FILES = 4096
SHORT_KEY_LENGTH = 16


def check_settings(settings: Settings) -> Iterator[Remark]:
    """Which variables are set: wrong ones have ended the program before."""
    names = sorted(name for name in os.environ if name.startswith(PREFIX))
    found = f"set: {', '.join(names) or 'none'}; state is kept in {settings.home}"
    if shared := sorted(running.find(settings.home)):
        found += f"; of the `sluice up` that runs there: {', '.join(shared)}"
    yield ok(found)
    if settings.home.exists() and settings.home.stat().st_mode & 0o077:
        yield warning(f"other users can look into {settings.home}", f"`chmod 700 {settings.home}`")
    if 0 < len(settings.admin_key) < SHORT_KEY_LENGTH:
        yield warning("SLUICE_ADMIN_KEY is short enough to guess", "`openssl rand -base64 32`")


def check_models(settings: Settings) -> Iterator[Remark]:
    """models.yaml."""
    path = settings.models or BUILT_IN
    try:
        names = ", ".join(f"{model.name} ({model.engine})" for model in get_catalog().models)
    except SluiceError as wrong_file:
        raise UnusableError(
            explain(wrong_file, settings),
            "mend the file, or set SLUICE_MODELS to another; "
            "tasks/contract/models.yaml shows all fields",
        ) from None
    yield ok(f"{path}: {names}")


def _inspect(settings: Settings, listed: Sequence[str] = ()) -> tuple[QueueStats, list[Problem]]:
    with connect_once(settings.redis_url) as redis:
        stats = read_stats(Backlog(redis, settings), listed)
    return stats, find_problems(stats, settings)


def _judge_all(problems: list[Problem], *names: str) -> list[Remark]:
    return [judge(problem) for problem in problems if problem.name in names]


def check_workers(settings: Settings) -> Iterator[Remark]:
    """Whether each model that has work, or may get it, has a worker, and the workers suffice."""
    stats, problems = _inspect(settings, [model.name for model in get_catalog().models])
    without = {problem.model for problem in problems if problem.name == "SluiceNoWorker"}
    for model in stats.models:
        if model.name in stats.listed:
            yield _judge_workers(model, wrong if model.name in without else warning)
    names = "SluiceUnlistedModel", "SluiceQueueDeep", "SluiceQueueOld", "SluiceKvCacheFull"
    yield from _judge_all(problems, *names)


def _judge_workers(model: ModelStats, judge_none: Callable[[str, str], Remark]) -> Remark:
    states = {"serving": model.serving, "draining": model.draining}
    number = ", ".join(f"{number} {state}" for state, number in states.items() if number)
    found = f"{model.name}: {number or 'no'} worker(s), {model.waiting.jobs} job(s) wait"
    return ok(found) if model.serving else judge_none(found, start_worker(model.name))


def check_maintenance(settings: Settings) -> Iterator[Remark]:
    """Whether the reaper ran lately, and whether there were repairs."""
    stats, problems = _inspect(settings)
    if stats.maintenance:
        yield ok(f"{stats.maintenance} lives")
    yield from _judge_all(problems, "SluiceNoMaintenance", "SluiceRepairs")


def check_pauses(settings: Settings) -> Iterator[Remark]:
    """Models that are paused."""
    _, problems = _inspect(settings)
    yield from _judge_all(problems, "SluiceQueuePaused") or [ok("no model is paused")]


def check_ledger(settings: Settings) -> Iterator[Remark]:
    """Whether changes of jobs get into SQL."""
    with connect_once(settings.redis_url) as redis:
        now_s, _ = redis.time()
        oldest: Any = redis.xrange(keys.LEDGER, count=1)
        waiting = redis.xlen(keys.LEDGER)
    age_s = now_s - int(oldest[0][0].split(b"-")[0]) / 1000 if oldest else 0.0
    found = f"{waiting} record(s) are not in SQL yet"
    if age_s > OLD_RECORD_S:
        yield wrong(
            f"{found}, the oldest for {age_s:.0f} s",
            "check maintenance's log, and mend the database if it is away",
        )
        return
    yield ok(found)


def check_model_files(_settings: Settings) -> Iterator[Remark]:
    """What a vLLM worker here would load, if any can run: warnings, as none may be meant to."""
    on_vllm = [model for model in get_catalog().models if model.engine == "vllm"]
    if not on_vllm:
        yield ok("no model needs vLLM")
        return
    if find_spec("vllm") is None:
        names = ", ".join(model.name for model in on_vllm)
        yield ok(f"vLLM is not installed here: workers for {names} run elsewhere")
        return
    for model in on_vllm:
        try:
            refuse_missing(model)
        except SluiceError as missing:
            yield warning(
                f"{model.name}: {missing}", f"then start `sluice worker --model {model.name}`"
            )
        else:
            yield ok(f"{model.name}: {model.source}")


def check_api(settings: Settings) -> Iterator[Remark]:
    """Whether the API answers, can serve, and is what listens there."""
    url = settings.api_url
    shown = without_password(url)
    try:
        live = httpx.get(f"{url}/health/live", timeout=API_TIMEOUT_S)
        ready = httpx.get(f"{url}/health/ready", timeout=API_TIMEOUT_S)
        is_ours, state = "streams" in live.json(), ready.json()
    except (httpx.ConnectError, httpx.ConnectTimeout) as away:
        yield _judge_unreachable(shown, explain(away, settings))
        return
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError):
        is_ours, state = False, {}
    if not is_ours:
        yield wrong(
            f"what listens at {shown} does not answer as the API does{_listener(url)}",
            "restart it if it is the API; if not, end it or choose another SLUICE_PORT",
        )
    elif ready.is_success:
        yield ok(f"{shown} answers, and is ready")
    else:
        yield _judge_unready(shown, state)
    if url.startswith("https:"):
        yield from warn_of_end(url, httpx.create_ssl_context())


def _judge_unreachable(url: str, reason: str) -> Remark:
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return wrong(
            f"the certificate at {url} is refused ({reason})",
            "renew it if it has expired; if its authority is your own, set SSL_CERT_FILE to that",
        )
    return wrong(
        f"no API answers at {url} ({reason})",
        "start one with `sluice api`, or set SLUICE_API_URL to where it runs",
    )


def _listener(url: str) -> str:
    """The process that listens at the URL, if it is on this machine and visible."""
    parts = urlsplit(url)
    is_here = parts.hostname in {"127.0.0.1", "localhost", "::1"}
    return listener(parts.port or 80) if is_here else ""


def _judge_unready(url: str, state: Any) -> Remark:
    found = f"{url} answers, and is not ready"
    if state.get("error", {}).get("code") == NoWorkerError.code:
        return warning(f"{found}: no worker lives", "start one: `sluice worker`")
    return wrong(
        f"{found}: it cannot reach Redis",
        "give the API a SLUICE_REDIS_URL that it can reach; `redis` above is about the one here",
    )


def check_disk(settings: Settings) -> Iterator[Remark]:
    """Space where the state is kept."""
    free = free_bytes(settings.home)
    found = f"{free / 2**30:.1f} GiB are free at {settings.home}"
    if free < NO_DISK_BYTES:
        yield wrong(
            f"the disk of {settings.home} is full: {free / 2**20:.0f} MiB are free", MAKE_ROOM
        )
    else:
        yield warning(found, MAKE_ROOM) if free < LITTLE_DISK_BYTES else ok(found)


def check_open_files(_settings: Settings) -> Iterator[Remark]:
    """How many streams an API that is started from here could have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < FEW_OPEN_FILES:
        yield warning(
            f"a process may open {limit} files, and each stream takes one",
            f"`ulimit -n {2**16}` before the API starts, or LimitNOFILE= in its systemd unit",
        )
        return
    yield ok(f"a process may open {limit} files")
