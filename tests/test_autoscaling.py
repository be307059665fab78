"""How many workers there should be: the decision, `sluice autoscale`, KEDA's queries, a day."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from bench import fleet
from bench.stack import Stack, await_that, running
from deploy.autoscale import Autoscaler, Policy, workers_for
from tests.conftest import SIM
from tests.kustomize import named, render
from tests.prometheus import DEPLOY, Prometheus, prometheus_config
from tests.test_client import command, sluice
from tests.test_jobs import submit
from tests.test_metrics import Metrics

POLICY = Policy(jobs_per_worker=10, min_workers=0, max_workers=8, hold_s=300)
LONG = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000}
SLOW = SIM | {"slots": 4, "args": {"tokens-per-s": 20, "first-token-s": 0.05}}
OVERLAYS = DEPLOY / "kubernetes" / "overlays"


@pytest.mark.parametrize(
    ("demand", "workers", "wanted"),
    [
        *((0, 0, 0), (0, 5, 0)),
        *((1, 0, 1), (10, 0, 1), (11, 0, 2), (1, 1, 1)),
        # Within a tenth of what there is.
        *((33, 3, 3), (34, 3, 4), (46, 5, 5), (40, 5, 4)),
        # The bounds.
        *((1_000, 0, 8), (85, 9, 8)),
    ],
)
def test_workers_are_wanted_for_what_runs_and_waits(demand: int, workers: int, wanted: int) -> None:
    assert workers_for(demand, workers, POLICY) == wanted


def test_a_fleet_has_its_least_size() -> None:
    assert workers_for(0, 0, Policy(10, 2, 8, 300)) == 2


def test_a_fleet_grows_at_once_and_shrinks_to_what_was_needed_lately() -> None:
    scaler = Autoscaler(POLICY)
    assert scaler.decide(0, 60, 1) == 6
    assert scaler.decide(15, 20, 6) == 6
    assert scaler.decide(30, 40, 6) == 6
    assert scaler.decide(301, 20, 6) == 4
    # Smaller than it was, and needed again.
    assert scaler.decide(316, 70, 4) == 7


def test_what_was_needed_once_starts_nothing() -> None:
    scaler = Autoscaler(POLICY)
    scaler.decide(0, 60, 6)
    assert scaler.decide(15, 20, 2) == 2


def test_the_workers_that_are_found_are_kept_at_first() -> None:
    scaler = Autoscaler(POLICY)
    assert scaler.decide(0, 0, 5) == 5
    assert scaler.decide(301, 0, 5) == 0
    assert Autoscaler(POLICY).decide(0, 0, 9) == POLICY.max_workers


@pytest.fixture
def busy(home: Path) -> Iterator[Stack]:
    """A worker with four slots, in all of which a job runs."""
    with running(Stack(home, [SLOW])) as stack:
        ids = [submit(stack, LONG)["id"] for _ in range(4)]
        await_that(lambda: waiting(stack) == 0, explain=lambda: waiting(stack))
        # Its worker has said so, too.
        await_that(lambda: demand(stack) == 4, explain=lambda: demand(stack))
        yield stack
        sluice(stack, "cancel", *ids)


def autoscale(stack: Stack, *options: str) -> str:
    done = sluice(stack, "autoscale", *options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def waiting(stack: Stack) -> float:
    return Metrics(f"{stack.url}/metrics", "sluice_queue_depth").total("sluice_queue_depth")


def demand(stack: Stack, model: str = "sim") -> float | None:
    """As any API reports it; None: it does not."""
    samples = Metrics(f"{stack.url}/metrics", "sluice_demand").samples
    return samples.get(("sluice_demand", (("model", model),)))


def test_without_workers_the_queue_is_what_counts(idle_stack: Stack) -> None:
    assert demand(idle_stack) == 0
    assert autoscale(idle_stack) == "0\n"
    for _ in range(3):
        submit(idle_stack)
    assert demand(idle_stack) == 3
    assert autoscale(idle_stack, "--jobs-per-worker=2") == "2\n"
    assert autoscale(idle_stack, "--jobs-per-worker=2", "--max=1") == "1\n"
    # Three quarters of 64 slots are room enough.
    assert autoscale(idle_stack) == "1\n"


def test_a_paused_model_needs_no_workers(idle_stack: Stack) -> None:
    submit(idle_stack)
    assert sluice(idle_stack, "pause", "sim").returncode == 0
    assert demand(idle_stack) == 0
    assert autoscale(idle_stack) == "0\n"
    assert sluice(idle_stack, "resume", "sim").returncode == 0
    assert autoscale(idle_stack) == "1\n"


def test_workers_that_keep_up_are_not_idle(busy: Stack) -> None:
    assert waiting(busy) == 0
    assert autoscale(busy, "--jobs-per-worker=2") == "2\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--min=5", "--max=3"), "--min 5 is more than --max"),
        (("--exec=scale",), "--exec has no {workers}"),
        (("--model=unknown",), "unknown"),
        (("--jobs-per-worker=0",), "--jobs-per-worker"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    idle_stack: Stack, options: tuple[str, ...], sentence: str
) -> None:
    done = sluice(idle_stack, "autoscale", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr


@contextmanager
def following(stack: Stack, hook: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`sluice autoscale --exec`, in a hurry."""
    hurried = "--interval-s=0.2", "--hold-s=1", "--jobs-per-worker=2"
    start = command(stack, "autoscale", "--exec", hook, *hurried, *options)
    with subprocess.Popen(
        **start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def calls(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def test_the_hook_is_called_for_each_change(idle_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "calls"
    with following(idle_stack, f"sh -c 'echo {{model}}:{{workers}} >> {file}'"):
        ids = [submit(idle_stack)["id"] for _ in range(3)]
        await_that(lambda: "sim:2" in calls(file), explain=lambda: calls(file))
        sluice(idle_stack, "cancel", *ids)
        await_that(lambda: calls(file)[-1] == "sim:0", explain=lambda: calls(file))
    seen = calls(file)
    assert all(one != other for one, other in pairwise(seen))


def test_a_hook_that_fails_is_called_again(idle_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "calls"
    submit(idle_stack)
    with following(idle_stack, f"sh -c 'echo {{workers}} >> {file}; exit 3'") as process:
        await_that(lambda: len(calls(file)) >= 3)
        assert process.stderr
        assert "--exec ended with 3" in process.stderr.readline()
    assert set(calls(file)) == {"1"}


def test_a_hook_that_hangs_is_killed_and_called_again(idle_stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "calls"
    submit(idle_stack)
    hook = f"sh -c 'echo {{workers}} >> {file}; exec sleep 1000'"
    with following(idle_stack, hook, "--timeout-s=0.5") as process:
        await_that(lambda: len(calls(file)) >= 3, explain=lambda: calls(file))
        assert process.stderr
        assert "--exec took longer than 0.5 s and was killed" in process.stderr.readline()
    assert set(calls(file)) == {"1"}


def test_the_hook_is_called_again_for_workers_that_do_not_come(
    idle_stack: Stack, tmp_path: Path
) -> None:
    file = tmp_path / "calls"
    submit(idle_stack)
    with following(idle_stack, f"sh -c 'echo {{workers}} >> {file}'", "--settle-s=0.5"):
        await_that(lambda: len(calls(file)) >= 3, explain=lambda: calls(file))
    assert set(calls(file)) == {"1"}


def test_a_worker_that_is_gone_is_asked_for_again(busy: Stack, tmp_path: Path) -> None:
    """The number is the same, but fewer serve."""
    file = tmp_path / "calls"
    hook, options = f"sh -c 'echo {{workers}} >> {file}'", ("--settle-s=1", "--max=1")
    with following(busy, hook, *options):
        busy.workers[0].kill_all()
        await_that(lambda: calls(file), explain=busy.logs)
    assert set(calls(file)) == {"1"}


def test_without_redis_all_stays_as_it_is(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "calls"
    with running(Stack(home, [SIM]), workers=0) as stack:
        ids = [submit(stack)["id"] for _ in range(3)]
        with following(stack, f"sh -c 'echo {{workers}} >> {file}'") as process:
            await_that(lambda: calls(file) == ["2"], explain=lambda: calls(file))
            stack.part("redis").kill()
            assert process.stderr
            assert "sluice: " in process.stderr.readline()
            stack.start_redis()
            sluice(stack, "cancel", *ids)
            await_that(lambda: calls(file)[-1] == "0", explain=lambda: calls(file))
        assert calls(file)[0] == "2"


def test_kedas_queries_answer_before_the_first_worker(idle_stack: Stack, home: Path) -> None:
    scaled = named(render(OVERLAYS / "gpu", OVERLAYS / "keda"), "ScaledObject", "sluice-worker")
    amount, recent = (
        each["metadata"]["query"].replace('model="chat", namespace="sluice"', 'model="sim"')
        for each in scaled["spec"]["triggers"]
    )
    with Prometheus(prometheus_config(home, idle_stack, "admin")) as server:
        value = lambda query: [sample.value for sample in server.query(query)]
        await_that(lambda: (value(amount), value(recent)) == ([0], [0]))
        for _ in range(3):
            submit(idle_stack)
        await_that(lambda: value(amount) == [3], explain=lambda: value(amount))
        await_that(lambda: value(recent) == [1], explain=lambda: value(recent))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, fleet.Outcome]:
    """A day of ten GPUs."""
    return {outcome.policy: outcome for outcome in fleet.simulate(10)}


def test_a_fleet_that_follows_the_work_is_cheap_and_quick(
    outcomes: dict[str, fleet.Outcome],
) -> None:
    ours, all_gpus = outcomes["running + queued"], outcomes["fixed, all GPUs"]
    assert (all_gpus.gpu_hours, all_gpus.changes) == (240, 0)
    assert ours.gpu_hours < all_gpus.gpu_hours / 2
    assert ours.wait_p99_s < fleet.COLD_START_S < outcomes["fixed, the mean"].wait_p99_s
    assert ours.wait_p99_s <= outcomes["HPA on GPU use"].wait_p99_s


def test_a_fleet_that_follows_the_queue_alone_flaps(outcomes: dict[str, fleet.Outcome]) -> None:
    ours, queue_alone = outcomes["running + queued"], outcomes["HPA on the queue alone"]
    assert ours.flaps * 10 < queue_alone.flaps
    assert ours.gpu_hours < queue_alone.gpu_hours


def by_hour(gpus: int) -> list[float]:
    """The jobs of each hour, as shares of those of the busiest one without a burst."""
    most = gpus * fleet.SLOTS * fleet.BUSIEST / fleet.JOB_S * 3600
    day = fleet.arrivals(gpus)
    return [sum(day[hour * 3600 :][:3600]) / most for hour in range(24)]


def test_fleets_of_all_sizes_have_the_same_day() -> None:
    few, many = by_hour(10), by_hour(1_000)
    assert few == pytest.approx(many, rel=0.05)
    assert min(many) == pytest.approx(fleet.NIGHT, rel=0.1)


def test_each_job_of_the_day_is_counted_once() -> None:
    day = fleet.arrivals(10)[: 12 * 3600]
    for name, start, decide in fleet.policies(10, sum(day) / len(day)):
        counted = sum(fleet.replay(day, 10, start, decide).waits.values())
        assert counted == pytest.approx(sum(day)), name


def test_the_first_job_waits_for_a_worker_to_load() -> None:
    day = [0] * 1000 + [1] + [0] * 1000
    (decide,) = (one for name, _, one in fleet.policies(10, 0.0) if name == "running + queued")
    seen = fleet.replay(day, 10, 0, decide)
    (wait_s,) = seen.waits
    # Two intervals at most until it is seen.
    assert fleet.COLD_START_S < wait_s <= fleet.COLD_START_S + 2 * fleet.INTERVAL_S
    assert seen.size == 0
