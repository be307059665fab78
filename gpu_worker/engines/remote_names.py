"""What a remote server is asked for: as the model's entry says, or by a name that the server lists.

It knows none of the names that Sluice's clients use, unless its operator has given it these.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import httpx

from tasks.contract.errors import ConfigurationError
from tasks.contract.models import Model

MOST_NAMES = 10
MOST_CHARS = 100


@dataclass(frozen=True)
class Names:
    """The server's name for the model, and which of our names it stands for."""

    server_model: str | None = None
    """None: all names stay as they are."""
    replaced: Collection[str] | None = None
    """None: whatever is asked for."""

    def change(self, document: dict[str, Any]) -> dict[str, str]:
        """The field that names the model to the server; {} where the request's own does."""
        if self.server_model is None:
            return {}
        asked = document.get("model")
        if self.replaced is None or not asked or asked in self.replaced:
            return {"model": self.server_model}
        return {}


def choose(model: Model, listed: list[str]) -> Names:
    """By which name the server is asked for a model whose entry does not say so.

    Raises:
        ConfigurationError: the server has several, none with a name of this one.
    """
    ours = (model.name, *model.aliases)
    # Ollama lists tags, and does not need this one.
    known = [name for name in ours if name in listed or f"{name}:latest" in listed]
    if not listed:
        return Names()
    if len(listed) > 1 and not known:
        some = ", ".join(repr(name[:MOST_CHARS]) for name in listed[:MOST_NAMES])
        more = ", …" if len(listed) > MOST_NAMES else ""
        raise ConfigurationError(
            f"the server of {model.name} has {len(listed)} models: {some}{more}; name one: "
            "`-- --model NAME` behind `sluice up`, SLUICE_MODEL_ARGS='--model NAME', or args.model "
            "in models.yaml"
        )
    replaced = [name for name in ours if name not in known]
    return Names(listed[0] if len(listed) == 1 else known[0], replaced)


def listed_in(answer: httpx.Response) -> list[str]:
    """The ids in an answer to GET /v1/models; [] if it is none."""
    try:
        names = [entry["id"] for entry in answer.json()["data"]]
    except (KeyError, RecursionError, TypeError, ValueError):
        return []
    are_names = all(name and isinstance(name, str) for name in names)
    return list(dict.fromkeys(names)) if are_names else []
