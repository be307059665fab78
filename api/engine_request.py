"""What a request asks of the engine: how many sequences, and how many tokens of each.

Numbers are read as engines read them, which take "64" and 64.0 for 64.
"""

from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tasks.contract.errors import InvalidRequestError
from tasks.contract.job import Job, Lane
from tasks.contract.models import Model

# Field of the inputs, and those that say how many sequences each of them gets.
_SEQUENCES = {
    "/v1/chat/completions": ("", ("n",)),
    "/v1/completions": ("prompt", ("n", "best_of")),
    "/v1/embeddings": ("input", ()),
}
LENGTH_FIELDS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/embeddings": (),
}
"""How long an answer may get: the first that is given counts. vLLM knows no others."""
# As many as SQL's integers hold; no model has so much context.
MOST_MAX_TOKENS = 2**31 - 1
_NUMBER = TypeAdapter(int)


def read_number(given: Any) -> int | None:
    """None: it is no number."""
    try:
        return _NUMBER.validate_python(given)
    except ValidationError:
        return None


def count_sequences(endpoint: str, document: dict[str, Any]) -> int:
    """How many sequences the engine is to generate, or embed, for a request.

    What is malformed counts as one: the engine refuses it.
    """
    inputs, numbers = _SEQUENCES[endpoint]
    each = max([1, *(read_number(document.get(name)) or 1 for name in numbers)])
    return each * _count_inputs(document.get(inputs))


def read_max_tokens(endpoint: str, document: dict[str, Any]) -> int | None:
    """Most tokens that the engine generates of each sequence; None: the request does not say.

    What is malformed says nothing: the engine refuses it.
    """
    if endpoint == "/v1/embeddings":
        return 0
    fields = (document.get(name) for name in LENGTH_FIELDS[endpoint])
    given = next((one for one in fields if one is not None), None)
    found = read_number(given)
    return None if found is None or found < 0 else min(found, MOST_MAX_TOKENS)


def admit_sequences(endpoint: str, document: dict[str, Any], model: Model) -> int:
    """How many slots of a worker the request takes.

    Raises:
        InvalidRequestError: more than a worker has.
    """
    sequences = count_sequences(endpoint, document)
    if not _SEQUENCES[endpoint][1]:
        # Inputs to embed are done in a moment each: many take all slots, and wait in the engine.
        return min(sequences, model.slots)
    if sequences > model.slots:
        raise InvalidRequestError(
            f"The request asks for {sequences:,} sequences at once, and {model.name} takes up to "
            f"{model.slots:,}; send it as several requests.",
            param=sequences_param(endpoint, document),
        )
    return sequences


def fit_batch(job: Job, model: Model) -> Job:
    """A batch job with no more sequences than a worker has room for while chats come.

    Raises:
        InvalidRequestError: it needs slots that are the chats'.
    """
    most = max(model.slots - model.reserved_slots, 1)
    if job.lane is not Lane.BATCH or job.sequences <= most:
        return job
    if not _SEQUENCES[job.endpoint][1]:
        return replace(job, sequences=most)
    raise InvalidRequestError(
        f"The request asks for {job.sequences:,} sequences at once, and {model.name} takes up to "
        f"{most:,} of a batch job; send it as several."
    )


def sequences_param(endpoint: str, document: dict[str, Any]) -> str:
    """The field that makes them many."""
    inputs = _SEQUENCES[endpoint][0]
    return inputs if _count_inputs(document.get(inputs)) > 1 else "n"


def _count_inputs(given: Any) -> int:
    """Several are a list of texts, or of lists of tokens; a list of tokens is one."""
    is_list = isinstance(given, list) and given and isinstance(given[0], (str, list))
    return len(given) if is_list else 1
