"""The rules for Prometheus: their own tests, and one alert from a stopped worker to a receiver."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import requests
import yaml

from bench.stack import Stack, await_that, running
from tests.conftest import SIM
from tests.prometheus import (
    DEPLOY,
    Alertmanager,
    Prometheus,
    alertmanager_config,
    program,
    prometheus_config,
)
from tests.test_jobs import CHAT, STREAM, submit
from tests.test_webhooks import Receiver, receiving

ALERTS_YML = DEPLOY / "prometheus" / "alerts.yml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS_YML.read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
NAMES = sorted({alert["alert"] for alert in ALERTS})
RUNBOOK = (DEPLOY.parent / "docs" / "operations.md").read_text()

Report = Callable[[str], None]


@pytest.mark.parametrize(
    ("checker", "task", "file"),
    [
        ("promtool", "check config --syntax-only", "prometheus/prometheus.yml"),
        ("promtool", "check rules", "prometheus/alerts.yml"),
        ("promtool", "test rules", "prometheus/alerts_test.yml"),
        ("amtool", "check-config", "alertmanager/alertmanager.yml"),
    ],
)
def test_the_shipped_files_pass(checker: str, task: str, file: str, report: Report) -> None:
    command = [program(checker), *task.split(), file]
    run = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False)
    for line in filter(None, (run.stdout + run.stderr).splitlines()):
        report(line)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_an_alert_is_tested_and_explained(name: str) -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    expected = [case["exp_alerts"] for case in cases if case["alertname"] == name]
    assert any(expected), "no test in which it fires"
    assert not all(expected), "no test in which it does not"
    for alert in (alert for alert in ALERTS if alert["alert"] == name):
        fired = [one["exp_labels"]["severity"] for alerts in expected for one in alerts]
        assert alert["labels"]["severity"] in fired
        assert alert["for"]
        has_value = not alert["expr"].startswith("absent(")
        assert ("$value" in alert["annotations"]["description"]) == has_value
        assert alert["annotations"]["summary"]
        # The anchor that Markdown makes of the heading.
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert f"\n### {name}\n" in RUNBOOK


class PositionWatcher(NamedTuple):
    """A deployment that is watched."""

    stack: Stack
    prometheus: Prometheus
    receiver: Receiver

    def received(self, name: str, status: str) -> list[tuple[str, dict[str, Any]]]:
        """What the receiver got of an alert: where, and the alert."""
        return [
            (path, alert)
            for path, _, body in list(self.receiver.requests)
            for alert in json.loads(body)["alerts"]
            if (alert["labels"]["alertname"], alert["status"]) == (name, status)
        ]

    def was(self, name: str, state: str) -> bool:
        """Whether Prometheus has, or had, the alert in that state; `pending` is soon over."""
        alerts = f'ALERTS{{alertname="{name}",alertstate="{state}"}}'
        return bool(self.prometheus.query(f"max_over_time({alerts}[10m])"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PositionWatcher]:
    """Sluice, watched as the shipped files have it; what is minutes there is seconds here."""
    home, for_prometheus, for_alertmanager = map(
        tmp_path_factory.mktemp, ("sluice", "prometheus", "alertmanager")
    )
    with (
        running(Stack(home, [SIM])) as stack,
        receiving() as receiver,
        Alertmanager(
            alertmanager_config(for_alertmanager, f"127.0.0.1:{receiver.server_port}")
        ) as alertmanager,
        Prometheus(
            prometheus_config(for_prometheus, stack, "admin", alertmanager.address)
        ) as prometheus,
    ):
        yield PositionWatcher(stack, prometheus, receiver)


def test_workers_are_found_through_the_api(watched: PositionWatcher) -> None:
    (worker,) = workers(watched.stack)

    def found() -> dict[str, str]:
        targets = watched.prometheus.targets("sluice-worker")
        return {target["labels"]["worker"]: target["health"] for target in targets}

    await_that(lambda: found() == {worker: "up"}, explain=found)


def test_the_rules_ask_for_what_is_there(watched: PositionWatcher) -> None:
    """Names, labels and their values, such as the bounds of buckets, as a real Sluice has them."""
    text = "\n".join(rule["expr"] for rule in RULES)
    # No API has failed here.
    selectors = set(
        re.findall(
            r"(?<![:\w])(?:sluice_|up\b)\w*(?:\{[^}]*\})?", text.replace('status=~"5..", ', "")
        )
    )
    assert len(selectors) > 20

    def missing() -> set[str]:
        chat(watched.stack)
        return {selector for selector in selectors if not watched.prometheus.query(selector)}

    await_that(lambda: not missing(), explain=missing)


@pytest.mark.parametrize("seconds", [2, 8])
def test_the_share_of_slow_streams_is_known(watched: PositionWatcher, seconds: int) -> None:
    share = f"model:sluice_ttft_over_{seconds}s:ratio5m"

    def values() -> list[float]:
        chat(watched.stack)
        return [sample.value for sample in watched.prometheus.query(share)]

    await_that(lambda: values() == [0.0], explain=values)


def test_a_queue_that_nobody_serves_alerts_until_it_is_served(
    watched: PositionWatcher, report: Report
) -> None:
    stack, prometheus, _ = watched
    note = timeline(report)
    note("all is well")
    for worker in stack.workers:
        worker.stop()
    note("workers stopped")
    with submitting(stack) as submitted:
        note("jobs are submitted from now on")
        deep = 'max(sluice_queue_depth{lane="interactive"}) > 50'
        await_that(lambda: prometheus.query(deep))
        note(f"Prometheus sees {prometheus.query(deep)[0].value:.0f} jobs wait")
        for state in ("pending", "firing"):
            await_that(lambda state=state: watched.was("SluiceQueueDeep", state))
            note(f"SluiceQueueDeep is {state}")
        await_that(lambda: watched.received("SluiceQueueDeep", "firing"))
        note("the receiver gets SluiceQueueDeep as firing")
    stack.start_worker("sim")
    await_that(lambda: workers(stack))
    note(f"a worker is started for the {len(submitted)} jobs")
    for name in ("SluiceNoWorker", "SluiceQueueDeep"):
        await_that(lambda name=name: watched.received(name, "resolved"))
        note(f"the receiver gets {name} as resolved")
    path, alert = watched.received("SluiceQueueDeep", "firing")[0]
    assert path == "/warning"
    labels = {"model": "sim", "lane": "interactive", "severity": "warning"}
    assert alert["labels"] == labels | {"alertname": "SluiceQueueDeep"}
    assert re.match(r"\d+ jobs wait", alert["annotations"]["description"])
    assert {path for path, _ in watched.received("SluiceNoWorker", "firing")} == {"/critical"}
    await_that(lambda: not prometheus.get("/api/v1/alerts")["data"]["alerts"])


def timeline(report: Report) -> Report:
    """Reports events with the seconds since now."""
    began_s = time.monotonic()
    return lambda what: report(f"{time.monotonic() - began_s:6.2f} s  {what}")


@contextmanager
def submitting(stack: Stack) -> Iterator[list[str]]:
    """Submits interactive jobs, faster than the alert's threshold needs; its value is their ids."""
    submitted: list[str] = []
    is_over = threading.Event()

    def submit_many() -> None:
        while not is_over.wait(0.05):
            submitted.append(submit(stack, CHAT, priority="interactive")["id"])

    thread = threading.Thread(target=submit_many)
    thread.start()
    try:
        yield submitted
    finally:
        is_over.set()
        thread.join()


def chat(stack: Stack) -> None:
    """One streamed answer."""
    assert requests.post(f"{stack.url}/v1/chat/completions", json=STREAM, timeout=60).ok


def workers(stack: Stack) -> set[str]:
    """The ids of the workers that live."""
    url, key = f"{stack.url}/v1/admin/workers", {"Authorization": "Bearer admin"}
    return {worker["id"] for worker in requests.get(url, headers=key, timeout=60).json()["data"]}
