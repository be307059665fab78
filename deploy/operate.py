"""The operator's commands: drain, pause, resume, dead, autoscale.

They need Redis and SQL, not the API.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from tasks.contract.settings import get_settings

if TYPE_CHECKING:
    from tasks.queue.jobs import Jobs


def queue() -> "Jobs":
    """The queue of the settings."""
    from tasks.contract.connections import connect
    from tasks.queue.jobs import Jobs

    settings = get_settings()
    return Jobs(connect(settings.redis_url), connect(settings.bus_url))


@click.command()
@click.argument("worker", required=False)
def drain(worker: str | None) -> None:
    """Have WORKER take no more jobs, finish, and end; without WORKER: list the workers."""
    from rich.table import Table

    from deploy.job_text import make_console
    from tasks.queue import control

    jobs = queue()
    if worker is not None:
        control.drain(jobs.backlog.redis, jobs.bus, worker)
        click.echo(f"{worker} drains; what it has not finished in time others go on with")
        return
    table = Table("worker", "model", "state", "running", "slots", box=None)
    for found in control.workers(jobs.backlog.redis):
        table.add_row(found.id, found.model, found.state, str(found.running), str(found.slots))
    make_console().print(table)


@click.command()
@click.argument("model")
def pause(model: str) -> None:
    """Have no worker take jobs of MODEL; its backlog goes on growing."""
    from tasks.contract.models import get_catalog

    jobs = queue()
    name = get_catalog().resolve(model).name
    jobs.backlog.pause(name)
    click.echo(f"{name} is paused; `sluice resume {name}` ends that")


@click.command()
@click.argument("model")
def resume(model: str) -> None:
    """End the pause of MODEL."""
    from tasks.contract.models import get_catalog

    jobs = queue()
    name = get_catalog().resolve(model).name
    jobs.backlog.resume(name)
    click.echo(f"{name} is served again")


@click.group(name="dead")
def dead_letters() -> None:
    """Look after jobs that were given up: each of their attempts failed."""


@dead_letters.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_dead(limit: int, as_json: bool) -> None:
    """List dead letters, the latest first."""
    import orjson
    from rich.table import Table

    from db import dead as letters
    from deploy.job_text import make_console
    from tasks.maintenance import dead_letters as dead

    found = letters.letters(get_settings().database_url, limit)
    if as_json:
        for job in found:
            click.echo(orjson.dumps(dead.describe(job)))
        return
    table = Table("id", "model", "died at", "attempts", box=None)
    table.columns[0].no_wrap = True
    for job in found:
        died_at = f"{job.died_at:%Y-%m-%d %H:%M:%S}" if job.died_at else ""
        table.add_row(job.id, job.model, died_at, str(job.attempts))
    make_console().print(table)


@dead_letters.command("show")
@click.argument("job")
def show_dead(job: str) -> None:
    """Show a dead letter with the reason of each failure, as JSON."""
    import orjson

    from tasks.maintenance import dead_letters as dead

    view = dead.show(get_settings().database_url, job)
    click.echo(orjson.dumps(view, option=orjson.OPT_INDENT_2))


@dead_letters.command("retry")
@click.argument("job", nargs=-1, required=True)
def retry_dead(job: tuple[str, ...]) -> None:
    """Queue each JOB again, as a new job."""
    from tasks.maintenance import dead_letters as dead

    jobs = queue()
    for job_id in job:
        again = dead.retry(jobs, get_settings().database_url, job_id)
        click.echo(f"{job_id} is queued again as {again}")


@dead_letters.command("purge")
@click.argument("job", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Delete every dead letter.")
def purge_dead(job: tuple[str, ...], every: bool) -> None:
    """Delete each JOB with all that is known of it."""
    from db import dead as letters

    if bool(job) == every:
        raise click.UsageError("name the jobs, or give --all")
    deleted = letters.purge(get_settings().database_url, None if every else job)
    click.echo(f"{deleted} deleted")


@click.command()
@click.option("--model", metavar="NAME", help="A model of models.yaml; default: its first.")
@click.option("--min", "min_workers", type=click.IntRange(0), default=0, show_default=True)
@click.option("--max", "max_workers", type=click.IntRange(1), default=10, show_default=True)
@click.option(
    "--jobs-per-worker", type=click.IntRange(1), help="Default: 3/4 of the model's slots."
)
@click.option(
    "--exec",
    "hook",
    metavar="COMMAND",
    help="Called with each new number in place of {workers}, until Ctrl-C; no shell reads it.",
)
@click.option(
    "--interval-s",
    type=click.FloatRange(0, min_open=True),
    default=15,
    show_default=True,
    help="With --exec: between two readings.",
)
@click.option(
    "--hold-s",
    type=click.FloatRange(0),
    default=300,
    show_default=True,
    help="With --exec: for so long after they were needed workers are kept.",
)
@click.option(
    "--settle-s",
    type=click.FloatRange(0, min_open=True),
    default=600,
    show_default=True,
    help="With --exec: call it again when other workers serve than it was asked for, for so long.",
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(0, min_open=True),
    default=120,
    show_default=True,
    help="With --exec: kill the command after that, and call it again.",
)
def autoscale(**options: Any) -> None:
    """Print how many workers the running and queued jobs of a model need."""
    from deploy import autoscale as scaling

    with suppress(KeyboardInterrupt):
        scaling.run(scaling.Options(**options))


COMMANDS = (drain, pause, resume, dead_letters, autoscale)
