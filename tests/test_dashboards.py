"""The dashboards: whole, and with something to show for each query."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from bench.stack import Stack, await_that, running
from tests.conftest import SIM
from tests.prometheus import Prometheus, prometheus_config
from tests.test_deliveries import counted
from tests.test_webhooks import STACK_SETTINGS, receiving

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "metrics.md"
DIRECTORY = ROOT / "deploy" / "grafana"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(DIRECTORY.glob("*.json"))}
# What Grafana fills in; the window holds a whole run.
VARIABLES = {"$model": ".*", "$__rate_interval": "5m", "$__range": "5m"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
ENDPOINT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped a Sluice with the sim engine, on which much has happened."""
    home = tmp_path_factory.mktemp("dashboards")
    stack = Stack(home, [SIM], max_attempts=2, **STACK_SETTINGS)
    with (
        running(stack),
        receiving() as receiver,
        Prometheus(prometheus_config(home, stack, "admin")) as server,
    ):
        watch(server, lambda: work_and_fail(stack, receiver.url))
        yield server


@pytest.fixture
def vllm(vllm_stack: Stack, home: Path) -> Iterator[Prometheus]:
    """It has scraped a Sluice with the demo model on vLLM."""
    with Prometheus(prometheus_config(home, vllm_stack, "admin")) as server:
        watch(server, lambda: work(vllm_stack))
        yield server


def watch(prometheus: Prometheus, happen: Callable[[], None]) -> None:
    """Has it happen twice, with a scrape of API and worker after each: a rate needs a before."""
    await_that(lambda: len(prometheus.query("up == 1")) == 2)
    for _ in range(2):
        happen()
        await_scrape(prometheus)


def await_scrape(prometheus: Prometheus) -> None:
    now_s = time.time()
    await_that(lambda: prometheus.query("min(timestamp(up))")[0].value > now_s)


def work(stack: Stack) -> None:
    """Streams at once, and one job in the background."""
    body = CHAT | {"stream": True}
    with ThreadPoolExecutor(4) as pool:
        streams = pool.map(lambda _: call(stack, ENDPOINT, body), range(4))
        assert {stream.status_code for stream in streams} == {200}
    job = submit(stack, CHAT)
    done = requests.get(f"{stack.url}/v1/jobs/{job}", headers={"Prefer": "wait=60"}, timeout=120)
    assert done.json()["status"] == "completed"


def work_and_fail(stack: Stack, receiver: str) -> None:
    """What works, a webhook, a cancelled job, a mistake, and a job that is given up."""
    work(stack)
    before = counted(stack.redis).get("delivered", 0)
    submit(stack, CHAT, webhook=receiver)
    long = submit(stack, CHAT | {"max_tokens": 60_000})
    assert call(stack, f"/v1/jobs/{long}/cancel").status_code == 200
    assert call(stack, ENDPOINT, CHAT | {"model": "unknown"}).status_code == 404
    assert call(stack, ENDPOINT, CHAT | {"sim": {"failure": "error"}}).status_code == 500
    # It is called some time after its job has ended.
    await_that(lambda: counted(stack.redis).get("delivered", 0) > before)


def submit(stack: Stack, body: dict[str, Any], **options: Any) -> str:
    answer = call(stack, "/v1/jobs", {"endpoint": ENDPOINT, "body": body, **options})
    return str(answer.json()["id"])


def call(stack: Stack, path: str, body: dict[str, Any] | None = None) -> requests.Response:
    return requests.post(stack.url + path, json=body, timeout=120)


def queries(board: str) -> dict[str, str]:
    """What the panels of a dashboard ask for, by title and legend, as Prometheus gets it."""
    return {
        f"{panel['title']} | {target['legendFormat']}": filled(target["expr"])
        for panel in BOARDS[board]["panels"]
        for target in panel.get("targets", [])
    }


def filled(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


def numbers(prometheus: Prometheus, query: str) -> list[float]:
    values = [sample.value for sample in prometheus.query(query)]
    return [value for value in values if math.isfinite(value)]


def test_ids_and_places_are_unique_and_all_is_explained() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS) == 3
    for board in BOARDS.values():
        panels = [panel for panel in board["panels"] if panel["type"] != "row"]
        assert all(panel["description"].endswith(".") for panel in panels)
        places = Counter(str(panel["gridPos"]) for panel in board["panels"])
        assert max(places.values()) == 1
        assert max(Counter(panel["id"] for panel in board["panels"]).values()) == 1


def test_all_documented_metrics_are_shown_and_no_others() -> None:
    documented = re.findall(r"^\| `(sluice_\w+)`", DOCS.read_text(), re.MULTILINE)
    shown = re.findall(r"sluice_\w+", " ".join(q for b in BOARDS for q in queries(b).values()))
    assert {name.removesuffix("_bucket") for name in shown} == set(documented)


def test_grafana_finds_the_files_where_the_docs_mount_them() -> None:
    mounted = re.search(r"deploy/grafana:(\S+):ro", DOCS.read_text())
    provider = yaml.safe_load((DIRECTORY / "provisioning/dashboards/sluice.yaml").read_text())
    assert mounted
    assert [each["options"]["path"] for each in provider["providers"]] == [mounted[1]]


@pytest.mark.parametrize("board", BOARDS)
def test_each_query_but_those_of_vllm_has_an_answer(board: str, sim: Prometheus) -> None:
    asked = queries(board)
    of_vllm = [name for name, query in asked.items() if "vllm:" in query]
    silent = lambda: [name for name, query in asked.items() if not numbers(sim, query)]
    # What SQL has, such as dead letters, a later scrape may be the first to see.
    await_that(lambda: silent() == of_vllm, explain=silent)


def test_each_query_of_the_workers_has_an_answer_with_vllm(vllm: Prometheus) -> None:
    asked = queries("workers")
    assert [name for name, query in asked.items() if not numbers(vllm, query)] == []


@pytest.mark.parametrize(
    ("board", "name", "labels"),
    [
        ("overview", "Calls that failed | 5xx", {}),
        ("overview", "Calls answered with an error, by status | {{status}}", {"status": "404"}),
        ("queue", "Dead letters | Dead letters", {}),
        ("queue", "Put back, by cause | {{cause}}", {"cause": "engine_error"}),
        ("queue", "Ended per second, by status | {{status}}", {"status": "cancelled"}),
        ("queue", "Webhook calls | {{outcome}}", {"outcome": "delivered"}),
        ("workers", "Workers serving | Workers serving", {}),
    ],
)
def test_what_happened_is_seen(
    board: str, name: str, labels: dict[str, str], sim: Prometheus
) -> None:
    def found() -> dict[tuple[tuple[str, str], ...], float]:
        return {tuple(s.labels.items()): s.value for s in sim.query(queries(board)[name])}

    await_that(lambda: found().get(tuple(labels.items()), 0) > 0, explain=found)
