"""What a request of a key may ask of the engine: within its limits, and a cache of its own."""

from collections.abc import Mapping
from typing import Any

from api import instruments, told
from api.principal import Principal
from tasks.contract.errors import InvalidRequestError
from tasks.contract.models import Model

# By the limit (contract/access.py): fields that ask for so many.
_FIELDS = {
    "tokens_per_answer": ("max_completion_tokens", "max_tokens"),
    "sequences_per_request": ("n", "best_of"),
    "logprobs_per_token": ("top_logprobs", "logprobs", "prompt_logprobs"),
}
# They are the server's to set where users have keys.
_OURS = ("cache_salt", "priority")
_LENGTH = {"/v1/chat/completions": "max_completion_tokens", "/v1/completions": "max_tokens"}


def bound(
    endpoint: str,
    document: dict[str, Any],
    size_bytes: int,
    principal: Principal,
    model: Model,
    *,
    is_busy: bool,
) -> dict[str, Any]:
    """The request as it goes to the engine: where the key limits answers, with that limit.

    vLLM reuses what it has computed of equal prompts, faster than others: of its own tenant's only,
    by the salt, so that nobody finds out by the time what others ask.

    Raises:
        InvalidRequestError: it asks for more than the key may.
    """
    if not principal.key_id:
        return document
    limits = _strictest(principal)
    _check_size(size_bytes, limits)
    for name, fields in _FIELDS.items():
        for field in fields:
            _check(document, field, limits.get(name))
    for field in _OURS:
        if document.get(field) is not None:
            raise InvalidRequestError(f"{field} is set by the server; leave it out.", param=field)
    added: dict[str, Any] = {}
    length = _LENGTH.get(endpoint)
    if length and "tokens_per_answer" in limits and _is_unbounded(document):
        added[length] = limits["tokens_per_answer"]
    if length and is_busy and "tokens_when_busy" in limits:
        added |= _cap(document | added, length, limits["tokens_when_busy"], model)
    if length and model.engine == "vllm":
        added["cache_salt"] = principal.tenant
    return document | added if added else document


def _cap(document: Mapping[str, Any], field: str, most: int, model: Model) -> dict[str, Any]:
    """Less than was asked for, as the model is busy."""
    asked = [document.get(name) for name in _FIELDS["tokens_per_answer"]]
    if any(isinstance(number, int) and number <= most for number in asked):
        return {}
    instruments.DEGRADED.labels(model.name, "capped").inc()
    told.note_degradation(f"max_tokens={most}")
    return dict.fromkeys(_FIELDS["tokens_per_answer"][1:], None) | {field: most}


def _strictest(principal: Principal) -> dict[str, int]:
    """By name, the least of the key's limits and of its tenant's."""
    found: dict[str, int] = {}
    for limits in principal.limits:
        for name, most in limits.items():
            if name != "subject":
                found[name] = min(most, found.get(name, most))
    return found


def _check_size(size_bytes: int, limits: Mapping[str, int]) -> None:
    most_bytes = limits.get("bytes_per_request", size_bytes)
    if size_bytes > most_bytes:
        raise InvalidRequestError(
            f"The request has {size_bytes:,} bytes; your key may send {most_bytes:,}."
        )


def _check(document: Mapping[str, Any], field: str, most: int | None) -> None:
    asked = document.get(field)
    # true: logprobs of a chat. What is no number the engine refuses.
    if most is None or isinstance(asked, bool) or not isinstance(asked, int | float):
        return
    if not 0 <= asked <= most:
        raise InvalidRequestError(
            f"{field} is {asked:,}; your key may ask for up to {most:,}.", param=field
        )


def _is_unbounded(document: Mapping[str, Any]) -> bool:
    return all(document.get(field) is None for field in _FIELDS["tokens_per_answer"])
