"""Traces, as a receiver of OpenTelemetry gets them; and that nobody needs one."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
from websockets.sync.client import connect

from bench.otlp import Received, Receiver
from bench.stack import Stack, await_that, running, serving
from deploy.redis_server import free_port
from tasks.contract import keys
from tasks.contract.tracing import Context
from tests.conftest import SIM
from tests.faults.clients import ENDPOINT, Client, await_tokens, chat
from tests.faults.conftest import LEASE_S, SLOW_SIM
from tests.test_jobs import CHAT, submit, wait
from tests.test_webhooks import STACK_SETTINGS, receiving

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
SECRET = "the capital of France"
API = f"POST {ENDPOINT}"
OTHERS_THAN_JOBS = {"/v1/models", "/health/live"}


@pytest.fixture
def collector() -> Iterator[Receiver]:
    with serving(Receiver()) as receiver:
        yield receiver


@contextmanager
def tracing(
    home: Path, endpoint: str, model: dict[str, Any] = SIM, workers: int = 1, **settings: Any
) -> Iterator[Stack]:
    """A deployment that samples what its clients do, and sends spans soon."""
    stack = Stack(home, [model], otlp_endpoint=endpoint, log_format="json", **settings)
    stack.env |= {
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0",
    }
    with running(stack, workers) as stack:
        yield stack


def await_spans(collector: Receiver, *names: str) -> list[Received]:
    """All that came, in the order of their beginnings, once there are so many of these names."""

    def names_there() -> list[str]:
        return sorted(span.name for span in collector.spans() if span.name in names)

    await_that(
        lambda: names_there() == sorted(names),
        explain=lambda: sorted(span.name for span in collector.spans()),
    )
    return sorted(collector.spans(), key=lambda span: span.begun_ns)


def tree(spans: list[Received]) -> dict[str, str]:
    """Whose child each is; the client's own span is `client`."""
    names = {span.id: span.name for span in spans} | {SPAN: "client"}
    return {span.name: names[span.parent_id] for span in spans}


def named(spans: list[Received], name: str) -> Received:
    (span,) = [span for span in spans if span.name == name]
    return span


def check_waits(spans: list[Received]) -> None:
    """Each attempt has had a wait of its own, which began when the one before it was taken back."""
    waits = [span for span in spans if span.name == "queue"]
    attempts = [span for span in spans if span.name == "chat sim"]
    assert [wait.ended_ns for wait in waits] == [attempt.begun_ns for attempt in attempts]
    assert all(wait.begun_ns <= wait.ended_ns for wait in waits)
    assert not any(wait.has_failed for wait in waits)
    assert attempts[0].begun_ns < waits[1].begun_ns


def traced_lines(stack: Stack, part: str) -> list[dict[str, Any]]:
    """What the part has logged with the client's trace."""
    # The last line may not be whole yet.
    *lines, _ = stack.part(part).log.read_text().split("\n")
    found = [orjson.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line.get("trace_id") == TRACE]


def traced_events(stack: Stack, part: str) -> set[str]:
    return {line["event"] for line in traced_lines(stack, part)}


def test_a_stream_is_one_trace(home: Path, collector: Receiver) -> None:
    with tracing(home, collector.url) as stack:
        for path in OTHERS_THAN_JOBS:
            requests.get(stack.url + path, headers=CLIENT, timeout=60)
        assert Client(stack, chat(max_tokens=2)).answer()  # not sampled
        body = chat(stream=True, max_tokens=20, seed=7, top_k=5) | {"user": SECRET}
        body["messages"].append({"role": "user", "content": SECRET})
        client = Client(stack, body, **CLIENT)
        answer = client.answer()
        spans = await_spans(collector, API, "relay", "queue", "chat sim", "prefill", "decode")
        assert {span.trace_id for span in spans} == {TRACE}
        assert tree(spans) == {
            API: "client",
            "queue": API,
            "chat sim": API,
            "claim": "chat sim",
            "prefill": "chat sim",
            "decode": "chat sim",
            "relay": API,
        }
        assert {span.service for span in spans} == {"sluice-api", "sluice-worker"}
        assert not any(span.has_failed or span.linked_ids for span in spans)
        request, attempt = named(spans, API), named(spans, "chat sim")
        job_id = client.headers["x-sluice-job"]
        assert request.attributes["sluice.job.id"] == attempt.attributes["sluice.job.id"] == job_id
        assert request.attributes["http.response.status_code"] == 200
        assert (
            attempt.attributes
            | {
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": "sim",
                "gen_ai.request.stream": True,
                "gen_ai.request.seed": 7,
                "gen_ai.request.top_k": 5,
                "gen_ai.request.temperature": 0.0,
                "gen_ai.response.id": f"chatcmpl-{job_id}",
                "gen_ai.response.model": "sim",
                "gen_ai.response.finish_reasons": ["length"],
                "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
                "gen_ai.usage.output_tokens": answer["usage"]["completion_tokens"],
                "sluice.job.attempt": 1,
            }
            == attempt.attributes
        )
        assert 0 < attempt.attributes["gen_ai.response.time_to_first_chunk"] < 60
        assert all(request.begun_ns <= s.begun_ns <= s.ended_ns for s in spans)
        prefill, decode = named(spans, "prefill"), named(spans, "decode")
        assert prefill.ended_ns == decode.begun_ns < decode.ended_ns <= attempt.ended_ns
        text = answer["choices"][0]["message"]["content"].encode()
        for path, export in collector.exports:
            assert path == "/v1/traces"
            assert SECRET.encode() not in export
            assert text not in export
        await_that(lambda: "job accepted" in traced_events(stack, "api"))
        await_that(lambda: {"job claimed", "job completed"} <= traced_events(stack, "worker"))


def test_each_request_on_a_websocket_is_a_span(home: Path, collector: Receiver) -> None:
    with tracing(home, collector.url) as stack:
        url = stack.url.replace("http", "ws") + ENDPOINT
        with connect(url, additional_headers=CLIENT) as ws:
            for _ in range(2):
                ws.send(orjson.dumps(chat(max_tokens=2)).decode())
                while ws.recv() != "[DONE]":
                    pass
        name = f"GET {ENDPOINT}"
        spans = await_spans(collector, name, name, "chat sim", "chat sim")
        assert tree(spans)[name] == "client"
        first, second = [span for span in spans if span.name == name]
        assert first.ended_ns <= second.begun_ns
        assert first.attributes["sluice.job.id"] != second.attributes["sluice.job.id"]


def test_attempts_are_linked(home: Path, collector: Receiver) -> None:
    with tracing(home, collector.url, SLOW_SIM, workers=2, lease_s=LEASE_S) as stack:
        client = Client(stack, chat(stream=True, max_tokens=100), **CLIENT)
        await_tokens([client], 10)
        (victim,) = [worker for worker in stack.workers if stack.jobs_of(worker)]
        victim.kill()
        usage = client.answer()["usage"]
        names = (API, "relay", "chat sim", "chat sim", "decode", "queue", "queue")
        spans = await_spans(collector, *names)
        first, second = [span for span in spans if span.name == "chat sim"]
        assert tree(spans)["chat sim"] == tree(spans)["queue"] == API
        check_waits(spans)
        assert [span.attributes["sluice.job.attempt"] for span in (first, second)] == [1, 2]
        assert (first.linked_ids, second.linked_ids) == ([], [first.id])
        assert first.service == "sluice-maintenance"
        assert (first.has_failed, first.attributes["error.type"]) == (True, "lease_expired")
        assert first.begun_ns < first.ended_ns
        assert not second.has_failed
        assert second.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
        assert named(spans, "decode").parent_id == second.id


def test_an_attempt_that_a_stopped_worker_hands_back_says_so(
    home: Path, collector: Receiver
) -> None:
    with tracing(home, collector.url, SLOW_SIM, workers=2, drain_s=0) as stack:
        client = Client(stack, chat(stream=True, max_tokens=100), **CLIENT)
        await_tokens([client], 10)
        (victim,) = [worker for worker in stack.workers if stack.jobs_of(worker)]
        assert victim.stop() == 0
        assert client.answer()
        spans = await_spans(collector, API, "relay", "chat sim", "chat sim", "queue", "queue")
        first, second = [span for span in spans if span.name == "chat sim"]
        check_waits(spans)
        assert first.service == "sluice-worker"
        assert (first.has_failed, first.attributes["error.type"]) == (True, "handed_back")
        assert (second.has_failed, second.linked_ids) == (False, [first.id])


@pytest.mark.parametrize("failure", ["die", "hang"])
def test_an_attempt_says_that_its_engine_died(
    home: Path, collector: Receiver, failure: str
) -> None:
    with tracing(home, collector.url, SLOW_SIM, engine_stall_s=3) as stack:
        (worker,) = stack.workers
        job = {"endpoint": ENDPOINT, "body": CHAT | {"sim": {"failure": failure}}}
        requests.post(f"{stack.url}/v1/jobs", json=job, headers=CLIENT, timeout=60)
        assert worker.popen.wait(120) == 1
        attempt = named(await_spans(collector, "POST /v1/jobs", "chat sim"), "chat sim")
        assert (attempt.has_failed, attempt.attributes["error.type"]) == (True, "engine_died")


def test_a_job_that_nobody_has_claimed_has_waited(home: Path, collector: Receiver) -> None:
    with tracing(home, collector.url) as stack:
        stack.redis.sadd(keys.PAUSED, "sim")
        job = {"endpoint": ENDPOINT, "body": CHAT, "deadline_s": 1}
        requests.post(f"{stack.url}/v1/jobs", json=job, headers=CLIENT, timeout=60)
        spans = await_spans(collector, "POST /v1/jobs", "queue")
        accepted, wait = named(spans, "POST /v1/jobs"), named(spans, "queue")
        assert tree(spans)["queue"] == "POST /v1/jobs"
        assert (wait.service, wait.has_failed) == ("sluice-maintenance", True)
        assert wait.attributes["error.type"] == "expired"
        # The deadline counts from when the job was recorded; it waits in the queue after that.
        assert accepted.begun_ns <= wait.begun_ns
        assert wait.ended_ns - accepted.begun_ns >= 1e9


def test_a_webhook_and_a_retry_belong_to_their_requests(home: Path, collector: Receiver) -> None:
    with (
        receiving(500, 204) as receiver,
        tracing(home, collector.url, **STACK_SETTINGS) as stack,
    ):
        job = {"endpoint": ENDPOINT, "body": CHAT, "webhook": receiver.url}
        accepted = requests.post(f"{stack.url}/v1/jobs", json=job, headers=CLIENT, timeout=60)
        assert accepted.status_code == 202
        spans = await_spans(collector, "POST /v1/jobs", "chat sim", "webhook", "webhook")
        assert {span.trace_id for span in spans} == {TRACE}
        parents = tree(spans)
        assert parents["POST /v1/jobs"] == "client"
        assert parents["webhook"] == parents["chat sim"] == "POST /v1/jobs"
        calls = [span for span in spans if span.name == "webhook"]
        assert [call.has_failed for call in calls] == [True, False]
        assert [call.attributes["http.response.status_code"] for call in calls] == [500, 204]
        job_id = accepted.json()["id"]
        assert all(call.attributes["sluice.job.id"] == job_id for call in calls)
        lines = lambda: [line["job"] for line in traced_lines(stack, "maintenance")]
        await_that(lambda: lines() == [job_id] * 2, explain=lines)  # of the two calls

        stack.redis.sadd(keys.PAUSED, "sim")
        cancelled = submit(stack, CHAT)["id"]
        requests.post(f"{stack.url}/v1/jobs/{cancelled}/cancel", timeout=60)
        stack.redis.srem(keys.PAUSED, "sim")
        url = f"{stack.url}/v1/jobs/{cancelled}/retry"
        again = requests.post(url, headers=CLIENT, timeout=60).json()["id"]
        spans = await_spans(
            collector, "POST /v1/jobs/<string:job_id>/retry", "chat sim", "chat sim"
        )
        jobs = [s.attributes["sluice.job.id"] for s in spans if s.name == "chat sim"]
        assert jobs == [job_id, again]


@pytest.mark.parametrize("is_hanging", [False, True])
def test_a_receiver_that_is_away_hurts_nobody(home: Path, is_hanging: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = free_port()
        if is_hanging:
            listener.listen(100)
            port = listener.getsockname()[1]
        with tracing(home, f"http://127.0.0.1:{port}") as stack:
            clients = [Client(stack, chat(n, stream=True), **CLIENT) for n in range(20)]
            for client in clients:
                assert client.answer()
            job = submit(stack, CHAT)
            assert wait(stack, job["id"]).json()["status"] == "completed"
            stack.stop()
            codes = {process.log.name: process.popen.returncode for process in stack.processes}
            assert not any(codes.values()), codes


def test_without_an_endpoint_nothing_is_sent_or_kept(home: Path, collector: Receiver) -> None:
    stack = Stack(home, [SIM], log_format="json")
    stack.env["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
    with running(stack):
        client = Client(stack, chat(stream=True), **CLIENT)
        client.answer()
        assert not stack.redis.hget(keys.job(client.headers["x-sluice-job"]), "traceparent")
        assert not traced_lines(stack, "api") + traced_lines(stack, "worker")
    assert collector.exports == []


def test_without_an_endpoint_nothing_is_imported(home: Path) -> None:
    """But what redis-py imports by itself, where it is installed: OpenTelemetry's metrics."""
    program = """
import sys
import api.app, gpu_worker.worker, tasks.maintenance.main
from tasks.contract import tracing
assert tracing.get_tracer("sluice-api") is None
ours = ("opentelemetry.exporter", "opentelemetry.sdk.trace", "tasks.contract.tracer")
print([name for name in sys.modules if name.startswith(ours)])
"""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(home), "SLUICE_HOME": str(home)}
    done = run(program, **env)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_an_endpoint_without_the_library_is_refused() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None
from tasks.contract import tracing
from tasks.contract.settings import get_settings
tracing.refuse_missing(get_settings())
"""
    done = run(program, SLUICE_OTLP_ENDPOINT="http://127.0.0.1:4318")
    assert done.returncode != 0
    assert "SLUICE_OTLP_ENDPOINT is set, and OpenTelemetry is not installed" in done.stderr
    assert "extra `tracing`" in done.stderr


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
    ],
)
def test_what_is_no_traceparent_says_nothing(header: str) -> None:
    assert Context.parse(header) is None


def run(program: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
