"""After the faults: all parts do their work, and then all guarantees must hold."""

from tests.model.world import FINAL, MODELS, World

MOST_ROUNDS = 12
SWEEP_SLICES = 30
LONG_S = 30 * 86_400
# The ledger is empty then.
LASTING = {
    b"sluice:counts",
    b"sluice:models",
    b"sluice:body_bytes",
    b"sluice:ledger",
    b"sluice:run",
}
LASTING_PREFIXES = (
    *(b"sluice:celery:gen.", b"sluice:service:", b"sluice:tokens:", b"sluice:level:"),
)


def drain(world: World) -> None:
    """Works until nothing is left to do.

    Raises:
        AssertionError: something is left, or was lost.
    """
    world.redis.fault = world.database.fault = None
    for model in MODELS:
        world.queue.backlog.resume(model)
        world.workers.append(world.new_worker(model, 4))
    for _ in range(MOST_ROUNDS):
        _work_off(world)
        _maintain(world)
        if _is_done(world):
            break
        world.pass_time(_until_due_s(world))
    else:
        raise AssertionError(f"never done: {_open(world)}")
    _check_promises(world)
    _check_nothing_stays(world)


def _work_off(world: World) -> None:
    for worker in world.workers:
        worker.renew()
        while worker.holds or worker.claim():
            for hold in list(worker.holds.values()):
                worker.go_on(hold)
    world.check()


def _maintain(world: World) -> None:
    world.queue.reap()
    world.check()
    world.recorder.record()
    world.reconciler.reconcile()
    world.check()


def _is_done(world: World) -> bool:
    return not world.expected.ledger and not _open(world)


def _open(world: World) -> list[str]:
    in_redis = [str(job) for job in world.expected.jobs.values() if job.is_open]
    in_sql = [str(row) for row in world.rows.values() if row.completed_at is None]
    return [*in_redis, *in_sql, *map(str, world.expected.ledger)]


def _until_due_s(world: World) -> float:
    """Until each lease or delay is over, by a clock that was set back."""
    due = [job.score for job in world.expected.jobs.values() if job.score and job.score < 1e16]
    waits = [(at_us - world.server.now_us) / 1e6 for at_us in due]
    return max([31.0, world.set_back_s, *waits]) + 1


def _check_promises(world: World) -> None:
    for job_id, asked in world.accepted.items():
        row = world.rows[job_id]
        result = (row.status in FINAL, row.results, row.entries, row.deliveries)
        assert result == (True, 1, 1, int(asked.has_webhook)), f"{row} is not what was promised"


def _check_nothing_stays(world: World) -> None:
    """Every key has an end but those that are documented to last."""
    for _ in range(2):
        # A log begun anew after its job was recorded: the sweeper sees that its job is gone.
        world.pass_time(LONG_S)
        for _ in range(SWEEP_SLICES):
            world.sweeper.sweep()
    world.pass_time(LONG_S)
    world.check()
    left = [key for key in world.server.raw.keys("sluice:*") if not _lasts(key)]
    assert not left, f"nobody will ever delete {left}"


def _lasts(key: bytes) -> bool:
    return key in LASTING or key.startswith(LASTING_PREFIXES)
