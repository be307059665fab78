"""What a request of a key may ask of the engine: within its limits, and a cache of its own."""

from collections.abc import Mapping
from typing import Any

from api import instruments, told
from api.engine_request import (
    LENGTH_FIELDS,
    count_sequences,
    read_max_tokens,
    read_number,
    sequences_param,
)
from api.principal import Principal
from tasks.contract.errors import InvalidRequestError
from tasks.contract.models import Model

_LOGPROBS = ("top_logprobs", "logprobs", "prompt_logprobs")
# The server's to set: the first is the lane's, the second keeps tenants apart.
PRIORITY, SALT = OURS = ("priority", "cache_salt")
BUDGETS = ("tokens_per_day", "tokens_per_month")
# Of an answer that counts against a budget, if its request sets no limit.
BUDGETED_TOKENS = 4096


def check(endpoint: str, document: dict[str, Any], size_bytes: int, principal: Principal) -> None:
    """Refuses what a key may not ask for.

    Raises:
        InvalidRequestError: it is too much, no number where one is bounded, or the server's to set.
    """
    _refuse(document, PRIORITY)
    if not principal.key_id:
        return
    _refuse(document, SALT)
    limits = _strictest(principal)
    most_bytes = limits.get("bytes_per_request", size_bytes)
    if size_bytes > most_bytes:
        raise InvalidRequestError(
            f"The request has {size_bytes:,} bytes; your key may send {most_bytes:,}."
        )
    for field in LENGTH_FIELDS[endpoint]:
        _check_number(document, field, limits.get("tokens_per_answer"))
    for field in _LOGPROBS:
        _check_number(document, field, limits.get("logprobs_per_token"))
    if document.get("use_beam_search") and _tokens_by_default(limits):
        _check_named(endpoint, document)
    if LENGTH_FIELDS[endpoint]:
        sequences = count_sequences(endpoint, document)
        most = limits.get("sequences_per_request")
        _check_most(sequences_param(endpoint, document), sequences, most)


def _refuse(document: dict[str, Any], field: str) -> None:
    if document.get(field) is not None:
        raise InvalidRequestError(f"{field} is set by the server; leave it out.", param=field)


def bound_tokens(
    endpoint: str, document: dict[str, Any], principal: Principal, model: Model, *, is_busy: bool
) -> int | None:
    """Most tokens of each sequence, which the worker sees to; None: it ends by itself."""
    asked = read_max_tokens(endpoint, document)
    if not principal.key_id or not LENGTH_FIELDS[endpoint]:
        return asked
    limits = _strictest(principal)
    most = asked
    if asked is None:
        most = _tokens_by_default(limits)
    cap = limits.get("tokens_when_busy") if is_busy else None
    if cap is not None and (most is None or most > cap):
        instruments.DEGRADED.labels(model.name, "capped").inc()
        told.note_degradation(f"max_tokens={cap}")
        most = cap
    return most


def _tokens_by_default(limits: Mapping[str, int]) -> int | None:
    """Most tokens of an answer whose request sets no limit."""
    has_budget = any(name in limits for name in BUDGETS)
    return limits.get("tokens_per_answer", BUDGETED_TOKENS if has_budget else None)


def _check_named(endpoint: str, document: dict[str, Any]) -> None:
    """The worker cannot see to the length of beams, which the engine makes of many answers."""
    if read_max_tokens(endpoint, document) is None:
        raise InvalidRequestError(
            "use_beam_search needs max_tokens, as your key limits tokens.", param="max_tokens"
        )


def complete(
    endpoint: str,
    document: dict[str, Any],
    principal: Principal,
    model: Model,
    max_tokens: int | None,
) -> dict[str, Any]:
    """The request as it goes to the engine.

    vLLM reuses what it has computed of equal prompts, faster than others: of its own tenant's only,
    by the salt, so that nobody finds out by the time what others ask. A remote server has to be
    told of the bound, as no worker looks at its tokens.
    """
    if not principal.key_id:
        return document
    added: dict[str, Any] = {}
    if model.engine == "vllm":
        added["cache_salt"] = principal.tenant
    elif model.engine == "remote" and max_tokens != read_max_tokens(endpoint, document):
        first, *others = LENGTH_FIELDS[endpoint]
        added = dict.fromkeys(others) | {first: max_tokens}
    return document | added if added else document


def _strictest(principal: Principal) -> dict[str, int]:
    """By name, the least of the key's limits and of its tenant's."""
    found: dict[str, int] = {}
    for limits in principal.limits:
        for name, most in limits.items():
            if name != "subject":
                found[name] = min(most, found.get(name, most))
    return found


def _check_number(document: Mapping[str, Any], field: str, most: int | None) -> None:
    given = document.get(field)
    if most is None or given is None:
        return
    asked = read_number(given)
    if asked is None:
        raise InvalidRequestError(f"{field} is no whole number.", param=field)
    _check_most(field, asked, most)


def _check_most(field: str, asked: int, most: int | None) -> None:
    if most is not None and not 0 <= asked <= most:
        raise InvalidRequestError(
            f"{field} asks for {asked:,}; your key may ask for up to {most:,}.", param=field
        )
