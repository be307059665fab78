"""Which model serves: wildcards, names that are split between models, and fallbacks."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.breaker import Breaker
from bench.stack import Stack, await_that, running
from tasks.contract import keys
from tasks.contract.errors import ConfigurationError, ModelNotFoundError
from tasks.contract.models import Catalog, Model, Route, load_catalog
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, call
from tests.test_metrics import Metrics

MODELS = [
    Model(name="large", engine="sim", aliases=("gpt-*", "gpt-4o")),
    Model(name="small", engine="sim", aliases=("gpt-4*",)),
]
CANARY = Route(name="chat", split={"large": 9, "small": 1})


def test_a_wildcard_stands_for_names_that_are_not_there() -> None:
    catalog = Catalog(MODELS, [CANARY])
    names = {"gpt-3": "large", "gpt-4o": "large", "gpt-4o-mini": "small", "chat": "large"}
    assert {name: catalog.resolve(name).name for name in names} == names
    assert list(catalog.names) == ["large", "gpt-4o", "small", "chat"]
    with pytest.raises(ModelNotFoundError):
        catalog.resolve("llama")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"routes": [{"name": "large", "split": {"small": 1}}]}, "has the name of a model"),
        ({"routes": [{"name": "chat", "split": {"tiny": 1}}]}, "'tiny', which is no model"),
        ({"routes": [{"name": "chat", "split": {"small": 0}}]}, "greater than 0"),
        ({"routes": [{"name": "chat", "split": {}}]}, "at least 1"),
        ({"models": [{"name": "a", "fallbacks": ["b"]}]}, "'b', which is no model"),
    ],
)
def test_a_route_that_leads_nowhere_is_refused(
    tmp_path: Path, more: dict[str, Any], why: str
) -> None:
    file = tmp_path / "models.yaml"
    models = [{"name": "large", "engine": "sim"}, {"name": "small", "engine": "sim"}]
    file.write_text(yaml.safe_dump({"models": models} | more))
    with pytest.raises(ConfigurationError, match=why):
        load_catalog(file)


def test_a_name_is_split_by_weight_and_sticks_to_a_user() -> None:
    users = [f"user {number}" for number in range(10_000)]
    chosen = Counter(CANARY.choose(user) for user in users)
    assert 0.08 < chosen["small"] / len(users) < 0.12
    assert all(CANARY.choose(user) == CANARY.choose(user) for user in users[:100])
    assert {CANARY.choose(None) for _ in range(1000)} == {"large", "small"}


def test_a_breaker_opens_on_failures_and_closes_when_a_probe_succeeds() -> None:
    breaker, seconds = Breaker(), itertools.count()
    completed = failed = 0

    def pass_second(more_completed: int, more_failed: int) -> bool:
        nonlocal completed, failed
        completed, failed = completed + more_completed, failed + more_failed
        now_s = float(next(seconds))
        breaker.note(completed, failed, now_s)
        return breaker.is_open(now_s)

    assert not any(pass_second(1, 1) for _ in range(40))
    assert any(pass_second(0, 2) for _ in range(40))
    # It lets one request a second pass when it has been open for a while; one that fails is enough.
    states = [pass_second(0, 0) for _ in range(12)]
    assert states[0]
    assert not states[-1]
    assert pass_second(0, 1)
    assert pass_second(0, 0)
    assert not pass_second(1, 0)
    assert not pass_second(0, 1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    main = SIM | {"aliases": ["gpt-*"], "fallbacks": ["spare"], "fallback_age_s": 3}
    home = tmp_path_factory.mktemp("routing")
    with running(Stack(home, [main, SIM | {"name": "spare", "aliases": []}], lease_s=3)) as stack:
        yield stack


def test_a_model_without_workers_is_stood_in_for(stack: Stack) -> None:
    first = call(stack, "POST", ENDPOINT, json=CHAT | {"model": "gpt-5"})
    assert first.headers["x-sluice-model"] == first.json()["model"] == "sim"
    assert "x-sluice-fallback" not in first.headers
    stack.workers[0].kill()

    def served() -> str:
        body = CHAT | {"model": "gpt-5", "max_tokens": 1}
        answer = call(stack, "POST", "/v1/jobs", json={"endpoint": ENDPOINT, "body": body})
        return str(answer.json()["model"])

    await_that(lambda: served() == "spare", 30)
    answer = call(stack, "POST", ENDPOINT, json=CHAT | {"model": "gpt-5"})
    assert answer.headers["x-sluice-fallback"] == "no_worker"
    assert answer.headers["x-sluice-model"] == answer.json()["model"] == "spare"
    seen = Metrics(f"{stack.url}/metrics")
    assert seen.total("sluice_fallbacks_total", fallback="spare", reason="no_worker") >= 1
    stack.start_worker("sim")
    await_that(lambda: served() == "sim", 30)


def test_a_model_whose_oldest_chat_has_waited_for_too_long_is_stood_in_for(stack: Stack) -> None:
    body = CHAT | {"model": "gpt-5", "max_tokens": 1}
    job = {"endpoint": ENDPOINT, "body": body, "priority": "interactive"}
    ask = lambda: call(stack, "POST", "/v1/jobs", json=job)
    stack.redis.sadd(keys.PAUSED, "sim")
    try:
        assert ask().json()["model"] == "sim"
        await_that(lambda: ask().headers.get("x-sluice-fallback") == "queue_age", 60)
        answer = call(stack, "POST", ENDPOINT, json=body)
        assert answer.headers["x-sluice-model"] == answer.json()["model"] == "spare"
    finally:
        stack.redis.srem(keys.PAUSED, "sim")
    await_that(lambda: ask().json()["model"] == "sim", 60)


def test_a_model_whose_jobs_fail_is_stood_in_for_until_one_succeeds(stack: Stack) -> None:
    body = CHAT | {"model": "gpt-5", "max_tokens": 1}

    def reason(**more: Any) -> str | None:
        job = {"endpoint": ENDPOINT, "body": body | more}
        return call(stack, "POST", "/v1/jobs", json=job).headers.get("x-sluice-fallback")

    await_that(lambda: reason(sim={"failure": "error"}) == "breaker_open", 60)
    # While it is open one of them a second may try again.
    await_that(lambda: [reason() for _ in range(3)] == [None] * 3, 60)


def test_a_request_that_is_too_long_for_the_model_goes_to_one_with_more_context(
    stack: Stack,
) -> None:
    worker = {"model": "sim", "slots": 1, "state": "serving", "running": 0, "waiting": 0}
    stack.redis.hset(keys.worker("narrow"), mapping=worker | {"max_model_len": 50})
    stack.redis.sadd(keys.WORKERS, "narrow")
    long = CHAT | {"model": "gpt-5", "max_tokens": 60}
    try:
        told = lambda: call(stack, "POST", ENDPOINT, json=long).headers.get("x-sluice-fallback")
        await_that(lambda: told() == "context", 10)
        short = call(stack, "POST", ENDPOINT, json=long | {"max_tokens": 2})
        assert short.headers["x-sluice-model"] == "sim"
    finally:
        stack.redis.srem(keys.WORKERS, "narrow")
        stack.redis.delete(keys.worker("narrow"))
