"""The program `sluice`: one command for each part; docs/configuration.md has the settings."""

import io
import math
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import click

from deploy import operate
from tasks.contract.errors import SluiceError

NEED_SQL = {"keys": "deploy.keys", "models": "deploy.models", "tenants": "deploy.keys"}


class Program(click.Group):
    """Commands whose errors are one sentence, not a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *NEED_SQL])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; those that need SQL are not loaded for others."""
        if cmd_name not in NEED_SQL:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(NEED_SQL[cmd_name]), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except SluiceError as wrong:
            error = wrong
        except Exception as failure:  # the boundary of the process
            from deploy.findings import find_trouble

            trouble = find_trouble(failure)
            if trouble is None:
                raise
            error = trouble.error
        from tasks.contract import logs

        # A thread writes the log: the error comes after all of it.
        logs.flush()
        click.echo(f"sluice: {error}", err=True)
        raise click.exceptions.Exit(2)


@click.group(cls=Program)
@click.version_option(package_name="sluice", message="%(prog)s %(version)s")
def main() -> None:
    """Self-hosted LLM serving with a queue at its heart."""
    # Its files (prompts, answers, keys) are this user's alone.
    os.umask(0o077)


@main.command()
@click.option(
    "--model", metavar="DIR_OR_ID", help="A directory, Hub id, URL, or sim; default: SLUICE_MODEL."
)
@click.option("--host", help="Where the API listens; default: SLUICE_HOST, or 127.0.0.1.")
@click.option("--port", type=click.IntRange(1, 65535), help="Default: SLUICE_PORT, or 8000.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- FLAGS OF `vllm serve`]")
def up(**chosen: Any) -> None:
    """Run everything on this machine, until Ctrl-C."""
    from deploy.up import run

    sys.exit(run(**chosen))


@main.command()
@click.option(
    "--bind", metavar="HOST:PORT", help="Where to listen; default: SLUICE_HOST:SLUICE_PORT."
)
def api(bind: str | None) -> None:
    """Run the HTTP API."""
    from api.server import serve
    from tasks.contract.settings import get_settings

    serve(bind or get_settings().bind)


@main.command()
@click.option("--model", metavar="NAME", help="A model of models.yaml; default: its first.")
def worker(model: str | None) -> None:
    """Run one GPU worker, which serves one model."""
    from gpu_worker.worker import run

    sys.exit(run(model))


@main.command()
def maintenance() -> None:
    """Run the maintenance worker: lost work is queued again, old state removed."""
    from tasks.maintenance.main import run

    sys.exit(run())


@main.command("migrate")
def migrate_database() -> None:
    """Bring the database's tables to this version; the API and maintenance do it, too."""
    from db import migrate
    from tasks.contract.settings import get_settings, without_password

    url = get_settings().database_url
    migrate(url)
    click.echo(f"{without_password(url)} is at this version")


URL = click.option("--url", help="The API; default: SLUICE_API_URL.")


def _read_pairs(_ctx: click.Context, _param: click.Parameter, pairs: list[str]) -> dict[str, str]:
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def _read_priority(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> str | int | None:
    from tasks.contract.job import LOWEST_PRIORITY, Lane

    if value is None or value in [*Lane]:
        return value
    with suppress(ValueError):
        if abs(int(value)) <= LOWEST_PRIORITY:
            return int(value)
    numbers = f"a number from -{LOWEST_PRIORITY} to {LOWEST_PRIORITY}"
    raise click.BadParameter(f"{value!r} is neither {' nor '.join(Lane)} nor {numbers}")


def _read_object(
    _ctx: click.Context, _param: click.Parameter, file: IO[bytes] | None
) -> dict[str, Any] | None:
    import orjson

    try:
        content = orjson.loads(file.read()) if file else None
    except orjson.JSONDecodeError as broken:
        raise click.BadParameter(f"not JSON: {broken}") from None
    if file and not isinstance(content, dict):
        raise click.BadParameter("not a JSON object")
    return content


def _read_deadline(
    _ctx: click.Context, _param: click.Parameter, value: float | None
) -> float | None:
    # JSON has neither NaN nor infinity.
    if value is None or 0 < value < math.inf:
        return value
    raise click.BadParameter(f"{value:g} is not a number of seconds above 0")


def _read_prompt(prompt: str) -> str:
    """The text: UTF-8 in every locale, as it is on its way."""
    if prompt == "-" and sys.stdin is None:
        raise click.UsageError("standard input is closed")
    try:
        if prompt == "-":
            return io.TextIOWrapper(sys.stdin.buffer, "utf-8").read()
        # Bytes that the locale has no characters for come as surrogates.
        return prompt.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError:
        what = "standard input" if prompt == "-" else "PROMPT"
        raise click.UsageError(f"{what} is not text in UTF-8") from None


@main.command()
@click.argument("prompt", required=False)
@click.option(
    "--body", type=click.File("rb"), callback=_read_object, help="JSON to send instead of PROMPT."
)
@click.option("--endpoint", metavar="PATH", help="Where --body goes; default: chat completions.")
@click.option("--model", metavar="NAME")
@click.option("--max-tokens", type=int)
@click.option(
    "--priority",
    metavar="PRIORITY",
    callback=_read_priority,
    help="interactive, batch, or -100 … 100 within batch: lower ones go first; default: batch.",
)
@click.option(
    "--deadline-s",
    type=float,
    callback=_read_deadline,
    help="Expires when it has not begun by then.",
)
@click.option("--webhook", metavar="URL", help="Called when the job has ended.")
@click.option("--metadata", metavar="NAME=VALUE", multiple=True, callback=_read_pairs)
@click.option("--watch", "is_watched", is_flag=True, help="Show the job to its end.")
@URL
def submit(
    prompt: str | None,
    body: dict[str, Any] | None,
    url: str | None,
    is_watched: bool,
    **options: Any,
) -> None:
    """Queue a job for PROMPT (-: standard input) and print its id."""
    from deploy import client

    if (prompt is None) == (body is None):
        raise click.UsageError("give either PROMPT or --body")
    if options["endpoint"] and body is None:
        raise click.UsageError("--endpoint needs --body")
    text = prompt and _read_prompt(prompt)
    api = client.Api(url)
    try:
        job = api.submit(client.compose(text, body, **options))
    except UnicodeEncodeError:
        raise click.UsageError("an option is not text in UTF-8") from None
    if is_watched:
        sys.exit(client.watch(api, job["id"]))
    click.echo(job["id"])


@main.command()
@click.argument("job")
@URL
def watch(job: str, url: str | None) -> None:
    """Show a job's place in the queue, then its text; exit code 1 unless it completes."""
    from deploy import client

    sys.exit(client.watch(client.Api(url), job))


@main.command("job")
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="The API's object.")
@URL
def show_job(job: str, as_json: bool, url: str | None) -> None:
    """Show a job: what became of it, when, and why."""
    from deploy import client

    client.show_job(client.Api(url), job, as_json=as_json)


@main.command()
@click.option("--status", metavar="STATUS", help="queued, in_progress, completed, failed, …")
@click.option("--model", metavar="NAME")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@URL
def jobs(status: str | None, model: str | None, limit: int, as_json: bool, url: str | None) -> None:
    """List jobs, the newest first."""
    from deploy import client

    found = client.Api(url).jobs(limit, status=status, model=model)
    client.show_jobs(found, as_json=as_json)


@main.command()
@click.argument("job", nargs=-1, required=True)
@URL
def cancel(job: tuple[str, ...], url: str | None) -> None:
    """Cancel jobs that have not ended."""
    from deploy import client

    client.cancel(client.Api(url), job)


FILE = click.Path(dir_okay=False, path_type=Path)
OLD_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@main.command()
@URL
@click.option("--model", metavar="NAME", help="Default: the first that the server lists.")
@click.option(
    "--streams",
    type=click.IntRange(1),
    show_default="8; 256 with --sweep",
    help="At once; with --sweep, at most.",
)
@click.option(
    "--requests", type=click.IntRange(1), default=100, show_default=True, help="Of each round."
)
@click.option("--max-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--save", metavar="FILE", type=FILE, help="Write the run here if nothing is wrong.")
@click.option("--baseline", metavar="FILE", type=OLD_FILE, help="A run saved earlier.")
@click.option(
    "--max-regression-percent",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    help="How much worse than the baseline the compared figures may be.",
)
@click.option(
    "--sla-ttft-ms",
    type=click.FloatRange(0),
    default=1000,
    show_default=True,
    help="Slower answers are no goodput; nor are those with a TPOT over the next.",
)
@click.option("--sla-tpot-ms", type=click.FloatRange(0), default=100, show_default=True)
@click.option(
    "--sweep",
    metavar="[PAGE]",
    type=FILE,
    is_flag=False,
    flag_value="saturation.html",
    help="Raise the streams to find the knee, and draw the curve here; default: saturation.html.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the run as JSON.")
def bench(**options: Any) -> None:
    """Measure streamed chats; exit code 1 for errors, or when worse than the baseline."""
    from deploy import gate, sweep

    page = options.pop("sweep")
    measured = gate.Options(**options)
    sys.exit(sweep.run(measured, page) if page else gate.run(measured))


@main.group()
def webhooks() -> None:
    """Look after webhooks."""


@webhooks.command("test")
@click.argument("url")
def call_webhook(url: str) -> None:
    """Send a signed test event to URL; exit code 1 unless it answers 2xx."""
    from tasks.contract.settings import get_settings
    from tasks.maintenance.webhooks import send_test

    outcome = send_test(url, get_settings())
    click.echo(f"{outcome.summary} after {outcome.duration_ms} ms")
    sys.exit(0 if outcome.is_delivered else 1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A list of objects.")
def doctor(as_json: bool) -> None:
    """Check every part and show how to fix what is wrong; exit code 1 if anything is."""
    from deploy.doctor import run

    sys.exit(run(as_json=as_json))


@main.command()
@click.option("--once", is_flag=True, help="Print it once, as where there is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="One object, once.")
def status(once: bool, as_json: bool) -> None:
    """Show models, workers and totals, every second until Ctrl-C."""
    from deploy.status import run

    run(once=once, as_json=as_json)


for _command in operate.COMMANDS:
    main.add_command(_command)


if __name__ == "__main__":
    main(prog_name="sluice")
