"""Adding, changing and removing models while Sluice runs, over HTTP and at the command line."""

from typing import Any

from pydantic import ValidationError

from db import model_entries
from tasks.contract.errors import (
    ConfigurationError,
    ConflictError,
    InvalidRequestError,
    ModelNotFoundError,
)
from tasks.contract.models import Catalog, Model
from tasks.queue.entries import fitting

Document = dict[str, Any]


def put(url: str, seed: Catalog, name: str, terms: Document) -> Document:
    """Makes the model, or gives it this entry; `seed` has what models.yaml has.

    Raises:
        InvalidRequestError: the entry is wrong, or a name in it is taken.
    """
    try:
        model = Model.model_validate({**terms, "name": name})
        entry = model.model_dump(mode="json", exclude_defaults=True)
        known = fitting(seed, model_entries.read(url))
        seed.changed({**known, name: entry})
    except ValidationError as refused:
        first = refused.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidRequestError(f"{place}: {first['msg']}.", param=place) from None
    except ConfigurationError as refused:
        raise InvalidRequestError(str(refused)) from None
    model_entries.write(url, name, entry)
    return describe(model, is_listed=_is_listed(seed, name))


def remove(url: str, seed: Catalog, name: str) -> Document:
    """Takes the model away: requests for it are 404; jobs that are queued stay so.

    Raises:
        ModelNotFoundError: no model has that name.
        ConflictError: others need it, or it is the only one.
    """
    stored = model_entries.read(url)
    entries = fitting(seed, stored)
    known = seed.changed(entries)
    is_known = any(model.name == name for model in known.models)
    if not is_known and stored.get(name) is None:
        raise ModelNotFoundError(name, known.names)
    try:
        seed.changed({**entries, name: None})
    except ConfigurationError as needed:
        raise ConflictError(f"The model cannot be removed: {needed}.") from None
    model_entries.write(url, name, None)
    return {"id": name, "object": "model.deleted", "deleted": True}


def listed(url: str, seed: Catalog) -> list[Document]:
    """All models as they are now."""
    known = seed.changed(fitting(seed, model_entries.read(url)))
    return [describe(model, is_listed=_is_listed(seed, model.name)) for model in known.models]


def describe(model: Model, *, is_listed: bool) -> Document:
    """The object that admins see; `env` by its names alone, which may hold secrets."""
    entry = model.model_dump(mode="json", exclude={"name", "env"})
    return (
        {"id": model.name, "object": "model.entry", "env": sorted(model.env)}
        | entry
        | {"is_in_file": is_listed}
    )


def _is_listed(seed: Catalog, name: str) -> bool:
    return any(model.name == name for model in seed.models)
