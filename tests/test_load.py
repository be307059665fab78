"""bench/load: Locust and wrk, as users run them, against a real deployment."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests

from bench.load.streamed import WrongAnswerError, read_answer
from bench.stack import Process, Stack, await_that, running
from deploy.redis_server import free_port
from tasks.contract import keys
from tests.conftest import SIM

ROOT = Path(__file__).parent.parent
LOAD = ROOT / "bench" / "load"
STREAMED = ("Chat", "Bursts", "LongPrompts")
ANY = "600000"  # ms: more than any machine takes
SLOW_IS_FINE = [f"--sla-{what}-ms={ANY}" for what in ("ttft", "tpot", "queue")]
SMALL = ("--max-tokens=8", "--think-s=0.1", "--prompt-words=50")


def command(url: str, *arguments: str) -> list[str]:
    """Locust's, with small requests."""
    program = [sys.executable, "-m", "locust", "--locustfile", str(LOAD / "locustfile.py")]
    return [*program, "--host", url, *SMALL, *arguments]


def locust(url: str, *arguments: str, users: int = 4) -> subprocess.CompletedProcess[str]:
    """A run without a page; what has begun when it is over may end."""
    size = (f"--users={users}", f"--spawn-rate={users}", "--run-time=4s", "--stop-timeout=60")
    run = command(url, "--headless", "--only-summary", *size, *arguments)
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_each_scenario_has_times_of_its_own(sim_stack: Stack, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    longer = ("--equal-weights", "--max-tokens=100")
    done = locust(sim_stack.url, *longer, f"--json-file={figures}", *SLOW_IS_FINE)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = {
        (entry["name"], entry["method"]): entry
        for entry in orjson.loads(figures.with_suffix(".json").read_bytes())
    }
    kinds = ("answer", "TTFT", "TPOT", "queue wait")
    expected = {(name, kind) for name in STREAMED for kind in kinds} | {("Batch", "job")}
    assert set(entries) == expected
    assert {entry["num_failures"] for entry in entries.values()} == {0}
    # The engine waits 10 ms for the first token, and 5 ms for each of the others.
    for name in STREAMED:
        assert entries[name, "TTFT"]["min_response_time"] >= 10
        # A busy client finds several of them at once, but not all.
        assert entries[name, "TPOT"]["max_response_time"] >= 1
        assert entries[name, "answer"]["min_response_time"] >= 500


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--sla-ttft-ms=1", "SLA missed: the p95 of Chat's TTFT is "),
        ("--sla-tpot-ms=0.1", "SLA missed: the p95 of Chat's TPOT is "),
    ],
)
def test_a_run_that_misses_the_sla_fails(sim_stack: Stack, option: str, sentence: str) -> None:
    # At the run's end Locust may cut off a request that has just been sent; it has then been silent
    # for more than 1 ms.
    options = (*SLOW_IS_FINE, "--sla-failed-percent=99", option)
    done = locust(sim_stack.url, *options, "Chat", users=2)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "SLA missed" in line]
    name, _, most = option.partition("=")
    assert sentence in line
    assert line.endswith(f" ms; {most} ms are allowed ({name})")


def test_failures_fail_a_run(sim_stack: Stack) -> None:
    refused = locust(sim_stack.url, "--model=unknown", *SLOW_IS_FINE, "Chat", users=1)
    assert refused.returncode == 1
    assert "SLA missed: nothing was answered, and " in refused.stderr
    assert "status 404" in refused.stderr


def test_failures_that_the_sla_allows_do_not(home: Path) -> None:
    options = ("--prompt-words=2000", "--equal-weights", *SLOW_IS_FINE, "Chat", "LongPrompts")
    with running(Stack(home, [SIM], max_body_bytes=4000)) as stack:
        failed = locust(stack.url, *options, users=2)
        allowed = locust(stack.url, "--sla-failed-percent=99", *options, users=2)
    assert failed.returncode == 1
    assert "requests failed; 0 % are allowed (--sla-failed-percent)" in failed.stderr
    assert "status 413" in failed.stderr
    assert (allowed.returncode, "SLA missed" in allowed.stderr) == (0, False)


def test_a_server_that_is_away_fails_the_run(sim_stack: Stack) -> None:
    done = locust(f"http://127.0.0.1:{free_port()}", *SLOW_IS_FINE, users=1)
    assert done.returncode == 1
    assert "SLA missed: nothing was answered" in done.stderr


def test_streams_that_hang_when_the_run_ends_fail_it(home: Path, tmp_path: Path) -> None:
    size = ("--users=2", "--run-time=20s", "--sla-tpot-ms=600000", "--sla-queue-ms=600000")
    with running(Stack(home, [SIM])) as stack:
        options = ("--headless", "--only-summary", *size, "Chat")
        run = Process(command(stack.url, *options), stack.env, tmp_path / "locust.log")
        try:
            await_that(lambda: newest_answers(stack), 60, run.log.read_text)
            (worker,) = stack.workers
            worker.signal(signal.SIGSTOP)
            assert run.popen.wait(200) == 1, run.log.read_text()
        finally:
            run.kill_all()
            worker.signal(signal.SIGCONT)
    assert "requests failed; 0 % are allowed" in run.log.read_text()
    assert "found silent for too long" in run.log.read_text()


def test_a_wait_in_the_queue_is_known_after_the_headers_were_sent(
    idle_stack: Stack, tmp_path: Path
) -> None:
    figures = tmp_path / "figures"
    size = ("--users=1", "--run-time=1s", "--stop-timeout=200", f"--json-file={figures}")
    options = ("--headless", "--only-summary", *size, *SLOW_IS_FINE, "Chat")
    run = Process(command(idle_stack.url, *options), idle_stack.env, tmp_path / "locust.log")
    try:
        await_that(lambda: queued(idle_stack), 60, run.log.read_text)
        # The stack sends its headers after a second without a worker.
        await_that(lambda: waited_s(idle_stack) >= 3)
        worker = idle_stack.start_worker("sim")
        assert run.popen.wait(200) == 0, run.log.read_text()
        worker.stop()
        idle_stack.processes.remove(worker)
    finally:
        run.kill_all()
    entries = orjson.loads(figures.with_suffix(".json").read_bytes())
    (wait,) = [entry for entry in entries if entry["method"] == "queue wait"]
    assert wait["max_response_time"] >= 1000


def queued(stack: Stack) -> list[bytes]:
    ids: Any = stack.redis.zrange(keys.backlog("sim", "interactive"), 0, -1)
    return list(ids)


def waited_s(stack: Stack) -> float:
    """How long the job that is queued has been there."""
    (job_id,) = queued(stack)
    queued_us: Any = stack.redis.hget(keys.job(job_id.decode()), "queued_us")
    return time.time() - int(queued_us) / 1e6


def test_the_page_shows_the_same_figures(sim_stack: Stack, tmp_path: Path) -> None:
    port = free_port()
    page = ("--web-host=127.0.0.1", f"--web-port={port}", "--autostart", "--users=2")
    run = Process(
        command(sim_stack.url, *page, *SLOW_IS_FINE, "Chat"), sim_stack.env, tmp_path / "log"
    )

    def kinds() -> set[str]:
        try:
            shown = requests.get(f"http://127.0.0.1:{port}/stats/requests", timeout=10)
        except requests.ConnectionError:
            return set()
        return {entry["method"] for entry in shown.json()["stats"]}

    try:
        await_that(lambda: {"TTFT", "TPOT", "queue wait"} <= kinds(), 120, run.log.read_text)
        options = requests.get(f"http://127.0.0.1:{port}/", timeout=10).text
        assert "sla_ttft_ms" in options
    finally:
        code = run.stop()
    assert code == 0, run.log.read_text()


def event(**chunk: Any) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def text_event(text: str) -> bytes:
    return event(choices=[{"delta": {"content": text}}])


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_stream_is_read_however_it_is_cut(line_end: bytes) -> None:
    role = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
    usage = event(choices=[], usage={"completion_tokens": 3})
    parts = (b": keep-alive\n\n", role, text_event("Hello"), text_event(" you"), usage)
    whole = b"".join((*parts, b"data: [DONE]\n\n")).replace(b"\n", line_end)
    for size in (1, 7, len(whole)):
        heard: list[float] = []
        pieces: Iterable[bytes] = (whole[at : at + size] for at in range(0, len(whole), size))
        answer = read_answer(pieces, 0, heard.append)
        assert (answer.text, answer.tokens) == ("Hello you", 3)
        assert heard == [answer.ttft_s, answer.last_text_s]
        assert 0 < answer.ttft_s <= answer.last_text_s <= answer.end_s
        assert answer.tpot_s is not None


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (text_event("Hello"), "without [DONE]"),
        (b"data: [DONE]\n\n", "without text"),
        (event(error={"code": "engine_died"}), "engine_died"),
        (b"data: {\n\n", "no JSON"),
    ],
)
def test_half_an_answer_is_none(stream: bytes, message: str) -> None:
    with pytest.raises(WrongAnswerError) as wrong:
        read_answer([stream], 0, print)
    assert message in str(wrong.value)


def wrk(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    load = ["wrk", "-t1", "-c4", "-d2s", "--timeout=60s", "-s", str(LOAD / "post.lua"), url]
    return subprocess.run(
        [*load, "--", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_wrk_posts_chats(sim_stack: Stack) -> None:
    done = wrk(sim_stack.url, "4", "gpt-3.5-turbo")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = done.stdout.splitlines()[-1]
    assert figures.startswith("answers/s ")
    assert figures.endswith(", failed 0")
    await_that(lambda: newest_answer(sim_stack) == ("sim", 4))


def newest_answers(stack: Stack) -> list[dict[str, Any]]:
    """The job of the newest one, if there is any."""
    url = f"{stack.url}/v1/jobs?limit=1&status=completed"
    found: list[dict[str, Any]] = requests.get(url, timeout=10).json()["data"]
    return found


def newest_answer(stack: Stack) -> tuple[str, int]:
    """Its model and its tokens."""
    (job,) = newest_answers(stack)
    return job["model"], job["usage"]["completion_tokens"]


@pytest.mark.parametrize(("arguments", "code"), [(("4", "unknown"), 1), (("many",), 2)])
def test_wrk_fails_when_the_answers_do(
    sim_stack: Stack, arguments: tuple[str, ...], code: int
) -> None:
    assert wrk(sim_stack.url, *arguments).returncode == code
