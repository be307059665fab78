"""Alerts of maintenance itself: real maintenance processes, workers, and a receiver on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.stack import Stack, await_that, running
from tasks.contract import keys
from tests.conftest import SIM
from tests.test_jobs import CHAT, submit
from tests.test_webhooks import Receiver, receiving

SLOW = SIM | {"slots": 1, "args": {"tokens-per-s": 100, "first-token-s": 0.5}}


def alerts(receiver: Receiver) -> list[dict[str, Any]]:
    """All alerts received, in order."""
    bodies = [json.loads(body) for _, _, body in receiver.requests]
    return [alert for body in bodies for alert in body["alerts"]]


def named(receiver: Receiver, name: str, status: str) -> list[dict[str, Any]]:
    return [
        alert
        for alert in alerts(receiver)
        if (alert["labels"]["alertname"], alert["status"]) == (name, status)
    ]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    # The first call fails: it must be repeated.
    with receiving(500, 200) as receiver:
        yield receiver


@pytest.fixture
def stack(home: Path, receiver: Receiver) -> Iterator[Stack]:
    """Two maintenance processes that alert."""
    settings: dict[str, Any] = {
        "alert_webhook": receiver.url,
        "alert_depth": 5,
        "alert_oldest_s": 6,
        "lease_s": 3,
    }
    with running(Stack(home, [SLOW], **settings)) as stack:
        stack.start_maintenance()
        yield stack


def test_a_queue_that_nobody_serves_wakes_somebody_until_it_is_served(
    stack: Stack, receiver: Receiver
) -> None:
    (worker,) = stack.workers
    worker.stop()
    jobs = [submit(stack, CHAT, priority="interactive")["id"] for _ in range(8)]
    names = {"SluiceQueueDeep", "SluiceQueueOld", "SluiceNoWorker"}
    await_that(lambda: all(named(receiver, name, "firing") for name in names), 240, stack.logs)
    stack.start_worker("sim")
    await_that(lambda: all(named(receiver, name, "resolved") for name in names), 240, stack.logs)

    first, second = (json.loads(body) for _, _, body in receiver.requests[:2])
    assert {alert["labels"]["alertname"] for alert in first["alerts"]} <= {
        alert["labels"]["alertname"] for alert in second["alerts"]
    }
    (deep,) = named(receiver, "SluiceQueueDeep", "resolved")
    assert deep["labels"] == {"alertname": "SluiceQueueDeep", "model": "sim", "severity": "warning"}
    assert deep["startsAt"] < deep["endsAt"]
    (nobody, *repeated) = named(receiver, "SluiceNoWorker", "firing")
    assert nobody["annotations"]["summary"] == (
        f"{len(jobs)} jobs wait for sim, and no worker serves it."
    )
    assert len(repeated) <= 1, "only the call that failed is repeated"
    # The fields of Alertmanager's webhooks, version 4.
    assert first.keys() == {
        *("version", "groupKey", "truncatedAlerts", "status", "receiver", "groupLabels"),
        *("commonLabels", "commonAnnotations", "externalURL", "alerts"),
    }
    assert nobody.keys() == {
        *("status", "labels", "annotations", "startsAt", "endsAt", "generatorURL", "fingerprint"),
    }


def test_what_is_over_soon_wakes_nobody(stack: Stack, receiver: Receiver) -> None:
    # Until it is seen, and then over as soon as one job has begun.
    stack.redis.sadd(keys.PAUSED, "sim")
    for _ in range(6):
        submit(stack, CHAT)
    await_that(lambda: b"SluiceQueueDeep" in (stack.redis.get(keys.ALERTS) or b""))
    stack.redis.srem(keys.PAUSED, "sim")
    await_that(lambda: stack.redis.get(keys.ALERTS) == b"[]")
    assert receiver.requests == []
