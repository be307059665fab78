"""Simulated users for Locust, and an SLA that decides its exit code.

    locust -f bench/load/locustfile.py --web-host 127.0.0.1     a page to start and watch from
    locust -f bench/load/locustfile.py --headless -u 50 -r 5 -t 5m Chat Batch

What the scenarios do and what is reported of them is in `docs/load-testing.md`.
"""

import logging
import random
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

import requests
from gevent import GreenletExit
from locust import User, constant, events, task
from locust.env import Environment
from locust.runners import WorkerRunner
from locust.stats import RequestStats

from bench.load.streamed import WrongAnswerError, read_answer
from bench.measurement import QUESTIONS
from tasks.contract.settings import get_settings

TIMEOUT_S = 60  # without a byte: the API sends keep-alives much more often
TURNS = 5
BURST_EVERY_S = 10
JOB_WAIT_S = 30
JOB_ENDED = {"completed", "failed", "cancelled", "expired"}
WORDS = " ".join(QUESTIONS).split()
# What Locust shows beside the end-to-end time, and the option with what is allowed of it.
LIMITS = {"TTFT": "sla_ttft_ms", "TPOT": "sla_tpot_ms", "queue wait": "sla_queue_ms"}
END_TO_END = ("answer", "job")

Message = dict[str, str]

logger = logging.getLogger("sluice")


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """The options of this file; the web page has them too."""
    add = parser.add_argument
    add("--model", default="", help="Default: the server's own")
    add("--max-tokens", type=int, default=64, help="Of each answer")
    add("--think-s", type=float, default=5, help="Of a person between two messages, on average")
    add("--prompt-words", type=int, default=1000, help="Of each long prompt")
    add("--sla-ttft-ms", type=float, default=1000, help="At most, for 95 of 100 answers")
    add("--sla-tpot-ms", type=float, default=100, help="At most, for 95 of 100 answers")
    add("--sla-queue-ms", type=float, default=500, help="At most, for 95 of 100 answers")
    add("--sla-failed-percent", type=float, default=0, help="Of answers and jobs, at most")


def think(user: User) -> float:
    """Seconds that a person takes."""
    return random.uniform(0.5, 1.5) * float(user.environment.parsed_options.think_s)


class Client(User):
    """One who sends requests; the classes below say which, and when."""

    abstract = True
    host = get_settings().api_url  # if there is no --host

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.options: Any = environment.parsed_options
        self.url = str(self.host).rstrip("/")
        self.http = requests.Session()
        if key := get_settings().api_key:
            self.http.headers["Authorization"] = f"Bearer {key}"

    def compose(self, messages: list[Message]) -> dict[str, Any]:
        """The body of a request."""
        model = {"model": self.options.model} if self.options.model else {}
        return model | {"messages": messages, "max_tokens": self.options.max_tokens}

    def stream(self, messages: list[Message], late_s: float = 0) -> str:
        """The answer's text, its times reported; empty if it failed, which is reported too.

        It counts from `late_s` before now.
        """
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        self.heard_s = asked_at_s = time.perf_counter() - late_s

        def hear(after_s: float) -> None:
            if self.heard_s == asked_at_s:
                self.report("TTFT", after_s)
            self.heard_s = asked_at_s + after_s

        try:
            with self.http.post(
                f"{self.url}/v1/chat/completions",
                json=self.compose(messages) | streamed,
                stream=True,
                timeout=TIMEOUT_S,
            ) as response:
                _refuse_status(response)
                # A whole chunk at a time, as soon as it is there.
                answer = read_answer(response.iter_content(None), asked_at_s, hear)
                waited_s = self._queue_wait_s(response)
        except GreenletExit:
            self._report_silence(asked_at_s)
            raise
        except (requests.RequestException, WrongAnswerError) as failed:
            self.report("answer", time.perf_counter() - asked_at_s, failed=failed)
            return ""
        self.report("answer", answer.end_s, answer.size_bytes)
        if answer.tpot_s is not None:
            self.report("TPOT", answer.tpot_s)
        if waited_s is not None:
            self.report("queue wait", waited_s)
        return answer.text

    def _report_silence(self, asked_at_s: float) -> None:
        """Where the run has ended: keep-alives alone may have come for longer than is allowed."""
        now_s = time.perf_counter()
        if 1000 * (now_s - self.heard_s) > self.options.sla_ttft_ms:
            silent = WrongAnswerError("a stream that the run's end found silent for too long")
            self.report("answer", now_s - asked_at_s, failed=silent)

    def _queue_wait_s(self, response: requests.Response) -> float | None:
        """None: the server is not Sluice."""
        headers = response.headers
        if "x-sluice-job" not in headers:
            return None
        if "x-sluice-queue-ms" in headers:
            return int(headers["x-sluice-queue-ms"]) / 1000
        # It waited for so long that the headers were sent before; its job knows, to the second.
        job = self.call("GET", f"/v1/jobs/{headers['x-sluice-job']}")
        return float(job["started_at"] - job["created_at"])

    def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The JSON that the API answers."""
        response = self.http.request(method, f"{self.url}{path}", timeout=TIMEOUT_S, **options)
        _refuse_status(response)
        answer: dict[str, Any] = response.json()
        return answer

    def report(
        self, kind: str, took_s: float, size_bytes: int = 0, failed: Exception | None = None
    ) -> None:
        """Tells Locust of a time, under the name of the scenario."""
        self.environment.events.request.fire(
            request_type=kind,
            name=type(self).__name__,
            response_time=took_s * 1000,
            response_length=size_bytes,
            exception=failed,
            context={},
        )


class Chat(Client):
    """A person: reads the answer, thinks, and goes on with the conversation."""

    weight = 10
    wait_time = think

    def on_start(self) -> None:
        self.messages: list[Message] = []

    @task
    def say(self) -> None:
        """One message, after all those before."""
        if len(self.messages) >= 2 * TURNS:
            self.messages.clear()
        question = _ask(random.choice(QUESTIONS))
        if text := self.stream([*self.messages, question]):
            self.messages += [question, {"role": "assistant", "content": text}]


class Bursts(Client):
    """A script that runs everywhere by the clock: all of these users send at the same moment.

    One that still had to wait for its last answer then counts from that moment.
    """

    weight = 5

    def on_start(self) -> None:
        self.due_s = time.time()

    def wait_time(self) -> float:
        return max(self.due_s - time.time(), 0)

    @task
    def ask(self) -> None:
        """One question, out of nothing."""
        late_s = max(time.time() - self.due_s, 0)
        self.due_s += BURST_EVERY_S - self.due_s % BURST_EVERY_S
        self.stream([_ask(random.choice(QUESTIONS))], late_s)


class LongPrompts(Client):
    """A person with documents, none of them like another, so that no prefix cache helps."""

    weight = 2
    wait_time = think

    @task
    def ask(self) -> None:
        """A question on a new document."""
        document = " ".join(random.choices(WORDS, k=self.options.prompt_words))
        self.stream([_ask(f"{document}\n\nWhat is this about?")])


class Batch(Client):
    """A program in the background: one job after the other in the lane `batch`."""

    weight = 1
    wait_time = constant(1)

    @task
    def run_job(self) -> None:
        """A job, from its submission to its end."""
        begun_s = time.perf_counter()
        body = self.compose([_ask(random.choice(QUESTIONS))])
        wanted = {"endpoint": "/v1/chat/completions", "body": body, "priority": "batch"}
        failed: Exception | None = None
        try:
            job = self.call("POST", "/v1/jobs", json=wanted)
            waiting = {"Prefer": f"wait={JOB_WAIT_S}"}
            while job["status"] not in JOB_ENDED:
                job = self.call("GET", f"/v1/jobs/{job['id']}", headers=waiting)
            if job["status"] != "completed":
                failed = WrongAnswerError(f"a job that is {job['status']}")
        except (requests.RequestException, WrongAnswerError) as error:
            failed = error
        self.report("job", time.perf_counter() - begun_s, failed=failed)


def _ask(content: str) -> Message:
    return {"role": "user", "content": content}


def _refuse_status(response: requests.Response) -> None:
    if not response.ok:
        raise WrongAnswerError(f"status {response.status_code}")


@events.quitting.add_listener
def judge(environment: Environment, **_others: object) -> None:
    """Says what the SLA misses; the exit code is 1 then."""
    if isinstance(environment.runner, WorkerRunner):
        return  # the master has all figures
    missed = list(_breaches(environment.stats, environment.parsed_options))
    for sentence in missed:
        logger.error("SLA missed: %s", sentence)
    if missed:
        environment.process_exit_code = 1
    elif environment.runner and not environment.runner.exceptions:
        # Failures that the SLA allows are none to Locust.
        environment.process_exit_code = 0


def _breaches(stats: RequestStats, options: Any) -> Iterator[str]:
    answers = [entry for entry in stats.entries.values() if entry.method in END_TO_END]
    asked = sum(entry.num_requests for entry in answers)
    failed = sum(entry.num_failures for entry in answers)
    if asked == failed:
        yield f"nothing was answered, and {failed} requests failed"
        return
    if 100 * failed / asked > options.sla_failed_percent:
        yield (
            f"{failed} of {asked} requests failed; {options.sla_failed_percent:g} % are allowed "
            "(--sla-failed-percent)"
        )
    for entry in stats.entries.values():
        if option := LIMITS.get(entry.method):
            p95_ms, most_ms = entry.get_response_time_percentile(0.95), getattr(options, option)
            if p95_ms > most_ms:
                yield (
                    f"the p95 of {entry.name}'s {entry.method} is {p95_ms} ms; {most_ms:g} ms are "
                    f"allowed (--{option.replace('_', '-')})"
                )
