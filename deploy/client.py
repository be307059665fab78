"""The commands that use the jobs API: submit, watch, job, jobs, cancel."""

import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote

import click
import httpx
import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from deploy.job_text import describe, outlook, reason, show_table
from tasks.contract.errors import SluiceError
from tasks.contract.settings import get_settings, without_password

# The API sends keep-alives at least every 10 s: a stream that is silent for longer is broken.
TIMEOUT_S = 30.0
RETRY_S = 0.5
GIVE_UP_S = 60.0
PAGE_JOBS = 100
# From a job's last event to its end in the queue.
END_WITHIN_S = 10
UNSUCCESSFUL = ("failed", "cancelled", "expired")
INTERRUPTED = 130  # as shells call a program that Ctrl-C has ended

Json = dict[str, Any]


class RequestRefusedError(SluiceError):
    """The API refused the request."""


class NotThereError(RequestRefusedError):
    """The API does not know it."""


class ApiAwayError(RequestRefusedError):
    """The API cannot be reached, or cannot answer at the moment."""


def compose(prompt: str | None, body: Json | None, **options: Any) -> Json:
    """The JSON of POST /v1/jobs; what was not given is left to the API."""
    terms = {name: value for name, value in options.items() if value is not None}
    for_engine = {name: terms.pop(name) for name in ("model", "max_tokens") if name in terms}
    content = _chat(prompt) if body is None else body
    return {"endpoint": "/v1/chat/completions"} | terms | {"body": content | for_engine}


def _chat(prompt: str | None) -> Json:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}


class Event(NamedTuple):
    """A server-sent event; one without data is a comment."""

    name: bytes
    id: bytes
    data: bytes


def _parse_events(pieces: Iterable[bytes]) -> Iterator[Event]:
    # By bytes: JSON may hold characters at which Python, but not SSE, would break lines.
    rest = b""
    for piece in pieces:
        *blocks, rest = (rest + piece).split(b"\n\n")
        for block in blocks:
            fields = dict(line.partition(b": ")[::2] for line in block.split(b"\n"))
            yield Event(*(fields.get(name, b"") for name in (b"event", b"id", b"data")))


class Api:
    """The jobs API at a URL, with the errors of this program; all methods raise them."""

    def __init__(self, url: str | None = None) -> None:
        settings = get_settings()
        url = (url or settings.api_url).strip()
        self.shown_url = without_password(url)
        headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        try:
            self._client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)
        except (httpx.InvalidURL, UnicodeEncodeError) as wrong:
            # What is taken for a port, say, may be a piece of a password.
            why = "" if "@" in url else f": {wrong}"
            raise RequestRefusedError(f"{self.shown_url} is not a URL{why}") from None

    @property
    def address(self) -> str:
        """The URL without user and password."""
        return str(self._client.base_url.copy_with(userinfo=b"")).rstrip("/")

    def submit(self, job: Json) -> Json:
        return self._call("POST", "/v1/jobs", json=job)

    def cancel(self, job_id: str) -> Json:
        return self._call("POST", f"{_path(job_id)}/cancel")

    def job(self, job_id: str, wait_s: int = 0) -> Json:
        """The job, after at most that wait for its end."""
        headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
        return self._call("GET", _path(job_id), headers=headers)

    def webhook(self, job_id: str) -> Json | None:
        """How the calls of the job's webhook went; None: it has none, or has not ended."""
        try:
            return self._call("GET", f"{_path(job_id)}/webhook")
        except NotThereError:
            return None

    def jobs(self, limit: int, **filters: str | None) -> Iterator[Json]:
        """The newest jobs, up to that many."""
        params: Json = {name: value for name, value in filters.items() if value}
        while limit > 0:
            params["limit"] = min(limit, PAGE_JOBS)
            page = self._call("GET", "/v1/jobs", params=params)
            yield from page["data"]
            limit -= params["limit"]
            params["after"] = page["last_id"]
            if not page["has_more"]:
                return

    def models(self) -> list[str]:
        """The names that requests may use, in the server's order."""
        return [model["id"] for model in self._call("GET", "/v1/models").get("data", [])]

    def follow(self, job_id: str) -> Iterator[Event]:
        """The job's events up to its last, each once, over as many connections as it takes."""
        last_id, lost_s, has_answered = b"", 0.0, False
        while True:
            try:
                for event in self._events(job_id, last_id):
                    lost_s, has_answered = 0.0, True
                    if event.data == b"[DONE]":
                        return
                    last_id = event.id or last_id
                    yield event
                raise ApiAwayError(f"{self.shown_url} ended the stream of {job_id} too early")
            except ApiAwayError as away:
                lost_s = lost_s or time.monotonic()
                if not has_answered or time.monotonic() - lost_s > GIVE_UP_S:
                    raise away from None
            time.sleep(RETRY_S)

    def _events(self, job_id: str, last_id: bytes) -> Iterator[Event]:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        path, kind = f"{_path(job_id)}/events", "text/event-stream"
        with self._open(kind, "GET", path, headers=headers) as answer:
            yield from _parse_events(answer.iter_bytes())

    def _call(self, method: str, path: str, **request: Any) -> Json:
        with self._open("application/json", method, path, **request) as answer:
            content: Json = orjson.loads(answer.read())
            return content

    @contextmanager
    def _open(self, kind: str, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        """The answer, if it is a success of that content type; to be read within the block."""
        try:
            with self._client.stream(method, path, **request) as answer:
                if not answer.is_success or kind not in answer.headers.get("content-type", ""):
                    answer.read()
                    raise self._refusal(answer)
                yield answer
        except httpx.TransportError as failure:
            why = str(failure) or type(failure).__name__
            raise ApiAwayError(
                f"no API answers at {self.shown_url} ({why}); start one with `make up`, "
                "or give its address: --url or SLUICE_API_URL"
            ) from None

    def _refusal(self, answer: httpx.Response) -> RequestRefusedError:
        away = dict.fromkeys((502, 503, 504), ApiAwayError)
        kind = ({404: NotThereError} | away).get(answer.status_code, RequestRefusedError)
        try:
            return kind(orjson.loads(answer.content)["error"]["message"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return kind(f"{self.shown_url} answered {answer.status_code}: {answer.text[:200]!r}")


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


class Screen:
    """What the user sees of a job: its place in the queue (stderr), then its text (stdout)."""

    def __init__(self, job_id: str) -> None:
        self.error, self._last, self._places = "", "", 0
        console = Console(stderr=True)
        columns = SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False)
        hidden = not console.is_interactive
        self._progress = Progress(*columns, console=console, transient=True, disable=hidden)
        self._bar = self._progress.add_task(job_id, total=None)
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()
        if self._last and not self._last.endswith("\n"):
            click.echo()

    def show(self, event: Event) -> None:
        """Takes the next event of the job."""
        if event.name == b"queue":
            self._show_queue(orjson.loads(event.data))
        elif event.data:
            answer = orjson.loads(event.data)
            if error := answer.get("error"):
                # A remote engine's error may have another form.
                self.error = str(error.get("message") if isinstance(error, dict) else error)
            elif text := _text(answer):
                self._progress.stop()
                self._last = text
                click.echo(text, nl=False)

    def _show_queue(self, queue: Json) -> None:
        place = queue["position"]
        self._places = max(self._places, place)
        parts = f"place {place} in the queue", outlook(queue)
        text, passed = ", ".join(filter(None, parts)), self._places - place
        self._progress.update(self._bar, total=self._places, completed=passed, description=text)


def _text(answer: Json) -> str:
    """What a person reads of an answer or chunk: its first choice's text, or all of another's."""
    if "choices" not in answer:
        return orjson.dumps(answer).decode()
    first: Json = next((choice for choice in answer["choices"] if not choice.get("index")), {})
    message = first.get("delta") or first.get("message") or first
    return str(message.get("content") or message.get("text") or "")


def watch(api: Api, job_id: str) -> int:
    """Shows a job to its end; returns the exit code of the program."""
    try:
        with closing(Screen(job_id)) as screen:
            for event in api.follow(job_id):
                screen.show(event)
    except KeyboardInterrupt:
        ways = f"`sluice watch {job_id}` shows it again, `sluice cancel {job_id}` ends it"
        click.echo(f"sluice: the job goes on; {ways}", err=True)
        return INTERRUPTED
    job = api.job(job_id, wait_s=END_WITHIN_S)
    if not screen.error and job["status"] not in UNSUCCESSFUL:
        return 0
    click.echo(f"sluice: {job_id} {job['status']}: {screen.error or reason(job)}", err=True)
    return 1


def cancel(api: Api, job_ids: Iterable[str]) -> None:
    """Cancels all that it can; raises a RequestRefusedError that names the others."""
    refusals = []
    for job_id in job_ids:
        try:
            click.echo(f"{job_id} {api.cancel(job_id)['status']}")
        except RequestRefusedError as refused:
            refusals.append(str(refused))
    if refusals:
        raise RequestRefusedError("; ".join(dict.fromkeys(refusals)))


def show_job(api: Api, job_id: str, *, as_json: bool) -> None:
    """Prints a job: in lines for people, or its JSON, as the API has it."""
    job = api.job(job_id)
    if as_json:
        click.echo(orjson.dumps(job, option=orjson.OPT_INDENT_2))
        return
    for line in describe(job, api.webhook(job_id)):
        click.echo(line)


def show_jobs(jobs: Iterable[Json], *, as_json: bool) -> None:
    """Prints jobs as a table, or one JSON object per line."""
    if not as_json:
        show_table(jobs)
        return
    for job in jobs:
        click.echo(orjson.dumps(job))
