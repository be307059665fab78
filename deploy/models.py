"""The commands `sluice models`. They need SQL only; the API sees a change within seconds."""

import sys
from pathlib import Path
from typing import Any

import click
import orjson
import yaml
from rich.table import Table

from db import migrate
from deploy.job_text import make_console
from tasks.contract.errors import InvalidRequestError
from tasks.contract.models import get_catalog
from tasks.contract.settings import get_settings
from tasks.maintenance import model_entries

JSON = click.option("--json", "as_json", is_flag=True, help="As the API has it.")


def _url() -> str:
    url = get_settings().database_url
    migrate(url)
    return url


@click.group(name="models")
def models() -> None:
    """Look after models while Sluice runs; models.yaml has those that it begins with."""


@models.command("list")
@JSON
def list_models(as_json: bool) -> None:
    """List all models."""
    found = model_entries.listed(_url(), get_catalog())
    if as_json:
        for model in found:
            click.echo(orjson.dumps(model))
        return
    table = Table("name", "engine", "source", "slots", "aliases", "fallbacks", box=None)
    for model in found:
        names = (", ".join(model[key]) for key in ("aliases", "fallbacks"))
        table.add_row(model["id"], model["engine"], model["source"], str(model["slots"]), *names)
    make_console().print(table)


@models.command("set")
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
def set_model(name: str, file: str) -> None:
    """Add NAME, or change it: FILE has its entry, as YAML or JSON; - reads it from here."""
    text = sys.stdin.read() if file == "-" else Path(file).read_text()
    made = model_entries.put(_url(), get_catalog(), name, _read(text))
    click.echo(orjson.dumps(made, option=orjson.OPT_INDENT_2))


def _read(text: str) -> dict[str, Any]:
    try:
        entry = yaml.safe_load(text)
    except yaml.YAMLError as broken:
        raise InvalidRequestError(f"the entry is not YAML: {broken}") from None
    if not isinstance(entry, dict):
        raise InvalidRequestError("the entry is no mapping; see the fields of models.yaml")
    return entry


@models.command("remove")
@click.argument("name", nargs=-1, required=True)
def remove(name: tuple[str, ...]) -> None:
    """Take each NAME away: requests for it are 404 from then on."""
    for model in name:
        model_entries.remove(_url(), get_catalog(), model)
        click.echo(f"{model} is removed")
