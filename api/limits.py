"""What of an engine's parameters is a user's business, and how much of it at once.

Everything else is the engine's to check. The costs that are bounded here come before it can answer:
a schema of two megabytes is compiled for minutes, and nobody else's schema meanwhile.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from tasks.contract.errors import InvalidRequestError
from tasks.contract.models import Model

# They reach into how the engine runs. A model's entry may allow them (`allow`).
OPERATORS_FIELDS = frozenset(
    {
        *("kv_transfer_params", "ec_transfer_params", "vllm_xargs"),
        *("mm_processor_kwargs", "media_io_kwargs"),
    }
)
# What the answer's form is made of: schemas, grammars, regular expressions, choices, tools.
FORM_FIELDS = ("response_format", "structured_outputs", "tools")
MOST_TOKEN_IDS = 1_000_000
MEDIA_ARG = "allowed-media-domains"


def check(document: dict[str, Any], model: Model, most_form_bytes: int) -> None:
    """Refuses what no user of that model may ask for.

    Raises:
        InvalidRequestError: it is one of the operator's fields, a form or list of token ids that is
            too large, or media that the engine would have to fetch.
    """
    for name in OPERATORS_FIELDS & document.keys() - set(model.allow):
        if document[name] is not None:
            raise InvalidRequestError(
                f"`{name}` is not open to users of {model.name}; leave it out.", param=name
            )
    for name in FORM_FIELDS:
        size_bytes = len(orjson.dumps(document[name])) if document.get(name) else 0
        if size_bytes > most_form_bytes:
            raise InvalidRequestError(
                f"`{name}` holds {size_bytes:,} bytes, and up to {most_form_bytes:,} are taken.",
                param=name,
            )
    for name in ("prompt", "input"):
        if _token_ids(document.get(name)) > MOST_TOKEN_IDS:
            raise InvalidRequestError(
                f"`{name}` holds more than {MOST_TOKEN_IDS:,} token ids.", param=name
            )
    if not model.args.get(MEDIA_ARG) and any(map(_is_elsewhere, _media(document))):
        raise InvalidRequestError(
            f"{model.name} fetches no media; send them in the request, as `data:` URLs.",
            param="messages",
        )


def _token_ids(given: Any) -> int:
    if not isinstance(given, list):
        return 0
    return sum(len(one) if isinstance(one, list) else 1 for one in given)


def _media(document: dict[str, Any]) -> Iterator[str]:
    """The URLs of pictures and sounds in the messages."""
    messages = document.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            for name, value in part.items() if isinstance(part, dict) else ():
                url = value.get("url") if isinstance(value, dict) else value
                if name.endswith("_url") and isinstance(url, str):
                    yield url


def _is_elsewhere(url: str) -> bool:
    return not url.strip().lower().startswith("data:")
