"""What a client asks for: a request to a model's engine, and how the client wants to have it."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError
from werkzeug.datastructures import Headers

from api import limits
from api.body import read_object
from api.services import Services
from tasks.errors import InvalidRequestError
from tasks.models import Model

LONGEST_WAIT_S = 60
LONGEST_KEY = 255
# Field of the inputs, and those that say how many sequences each of them gets.
_SEQUENCES = {
    "/v1/chat/completions": ("", ("n",)),
    "/v1/completions": ("prompt", ("n", "best_of")),
    "/v1/embeddings": ("input", ()),
}
_NUMBER = TypeAdapter(int)
_SECONDS = re.compile("[0-9]{1,9}")
_ON_DISCONNECT = ("abort", "continue")


@dataclass(frozen=True, slots=True)
class Call:
    """A request for the engine, its body as the engine gets it."""

    endpoint: str
    body: bytes
    model: Model
    sequences: int
    """How many the engine generates at once for it."""
    wants_stream: bool
    continues: bool
    """Whether the job runs on when its client goes away."""
    idempotency_key: str = ""
    fingerprint: str = ""

    @classmethod
    def read(cls, services: Services, endpoint: str, body: bytes, headers: Headers) -> "Call":
        """Reads a body as it came.

        Raises:
            InvalidRequestError: it is not JSON, an option of ours is wrong, or it asks for more at
                once than a worker of the model takes, or for what limits.py refuses.
            ModelNotFoundError: the model does not exist.
        """
        whole = document = read_object(body)
        if "message" in document and "messages" not in document and "prompt" not in document:
            document = _expand_short_form(document)
        on_disconnect, document = _take_on_disconnect(document, headers)
        name = document.get("model")
        model = services.catalog.resolve(name if isinstance(name, str) else None)
        limits.check(document, model, services.settings.max_schema_bytes)
        key = read_key(headers)
        return cls(
            endpoint,
            body if document is whole else orjson.dumps(document),
            model,
            _admit_sequences(endpoint, document, model),
            wants_stream=document.get("stream") is True,
            # A key says that the client will come back for the answer.
            continues=(on_disconnect or ("continue" if key else "abort")) == "continue",
            idempotency_key=key,
            fingerprint=fingerprint(endpoint, body),
        )


def count_sequences(endpoint: str, document: dict[str, Any]) -> int:
    """How many sequences the engine is to generate, or embed, for a request.

    What is malformed counts as one: the engine refuses it.
    """
    inputs, numbers = _SEQUENCES[endpoint]
    each = max([1, *(_read_number(document.get(name)) for name in numbers)])
    return each * _count_inputs(document.get(inputs))


def _read_number(given: Any) -> int:
    """As engines read it, which take "64" and 64.0 for 64."""
    try:
        return _NUMBER.validate_python(given)
    except ValidationError:
        return 1


def _count_inputs(given: Any) -> int:
    """Several are a list of texts, or of lists of tokens; a list of tokens is one."""
    is_list = isinstance(given, list) and given and isinstance(given[0], (str, list))
    return len(given) if is_list else 1


def _admit_sequences(endpoint: str, document: dict[str, Any], model: Model) -> int:
    sequences = count_sequences(endpoint, document)
    inputs, numbers = _SEQUENCES[endpoint]
    if not numbers:
        # Inputs to embed are done in a moment each: many take all slots, and wait in the engine.
        return min(sequences, model.slots)
    if sequences > model.slots:
        raise InvalidRequestError(
            f"The request asks for {sequences:,} sequences at once, and {model.name} takes up to "
            f"{model.slots:,}; send it as several requests.",
            param=inputs if _count_inputs(document.get(inputs)) > 1 else "n",
        )
    return sequences


def fingerprint(endpoint: str, body: bytes) -> str:
    """Tells requests with the same Idempotency-Key apart."""
    return hashlib.sha256(endpoint.encode() + b"\n" + body).hexdigest()


def read_key(headers: Headers) -> str:
    """The Idempotency-Key, '' for none.

    Raises:
        InvalidRequestError: it is too long or not printable.
    """
    key = headers.get("Idempotency-Key", "")
    if len(key) > LONGEST_KEY or not key.isprintable():
        raise InvalidRequestError(
            f"Idempotency-Key must be printable and at most {LONGEST_KEY} characters long."
        )
    return key


@dataclass(frozen=True, slots=True)
class Preference:
    """What the header Prefer says (RFC 7240)."""

    is_async: bool = False
    wait_s: int = 0

    @classmethod
    def read(cls, headers: Headers) -> "Preference":
        """Reads `respond-async` and `wait=N`; others are not ours, and ignored as the RFC says.

        Raises:
            InvalidRequestError: N is not a number of seconds.
        """
        wishes = [wish.strip().lower() for wish in headers.get("Prefer", "").split(",")]
        wait_s = 0
        for wish in wishes:
            name, _, value = wish.partition("=")
            if name.strip() == "wait":
                if not _SECONDS.fullmatch(value.strip()):
                    raise InvalidRequestError(
                        f"Prefer: wait takes whole seconds, as in wait=10, not {value[:20]!r}."
                    )
                wait_s = min(int(value), LONGEST_WAIT_S)
        return cls("respond-async" in wishes, wait_s)


def _expand_short_form(document: dict[str, Any]) -> dict[str, Any]:
    """`{"message": "Hello"}` as the full request: a user message, streamed."""
    rest = {name: value for name, value in document.items() if name != "message"}
    return {"messages": [{"role": "user", "content": document["message"]}], "stream": True} | rest


def _take_on_disconnect(
    document: dict[str, Any], headers: Headers
) -> tuple[str | None, dict[str, Any]]:
    """Our own field, and the rest, which is the engine's."""
    wish = document.get("on_disconnect", headers.get("x-sluice-on-disconnect"))
    if wish is not None and wish not in _ON_DISCONNECT:
        raise InvalidRequestError(
            f"on_disconnect is `abort` or `continue`, not {wish!r}.", param="on_disconnect"
        )
    if "on_disconnect" in document:
        document = {k: v for k, v in document.items() if k != "on_disconnect"}
    return wish, document
