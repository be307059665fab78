"""The model finds each hole that the queue once had, or could have, when it is opened again."""

import inspect
import textwrap
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase

from db import jobs as records
from tasks.maintenance import accepted
from tasks.maintenance.ledger import Recorder
from tests.model.conftest import Make
from tests.model.machine import QueueMachine, run

STEPS_AT_ONCE = 2000
MOST_STEPS = 50_000


class Hole(NamedTuple):
    """A line of a script, or of a function, as it was or could be wrong."""

    where: Any
    """Name of a script; or a class or module, and the name of its function."""
    right: str
    wrong: str


HOLES = {
    "a job that has started keeps its deadline": Hole(
        "claim", "drop_deadline(job)\n", "redis.call('ZREM', DEADLINES, job.id)\n"
    ),
    "a claim takes a job that is late from its place": Hole(
        "claim",
        "move(job, 'queued', DELAYED, whole(at_us))",
        "redis.call('ZREM', job.place, job.id)",
    ),
    "a claim takes a suspect that the worker may not run from its place": Hole(
        "claim",
        "local suspect = may_have_suspect and first",
        "if not may_have_suspect then redis.call('ZPOPMIN', SUSPECTS .. lane) end\n"
        "    local suspect = may_have_suspect and first",
    ),
    "a worker runs two suspects": Hole(
        "claim",
        "local may_have_suspect = #held_claims(KEYS[2]) == 0",
        "local may_have_suspect = true",
    ),
    "two suspects are claimed at once": Hole("claim", "        may_have_suspect = false\n", ""),
    "a claim whose reply was lost is made again": Hole(
        "claim", "local again = held_claims(KEYS[1])", "local again = {}"
    ),
    "of several claims whose reply was lost one is found": Hole(
        "claim", "table.concat(held_now, ' ')", "held"
    ),
    "jobs that are claimed at once take more slots than are free": Hole(
        "claim", "    free = free - (job.sequences or 1)\n", ""
    ),
    "a job that does not fit is claimed": Hole(
        "claim", "tonumber(job.sequences or 1) > room(lane)", "false"
    ),
    "a paused model is served": Hole(
        "claim", "redis.call('SISMEMBER', PAUSED, model) == 1", "false"
    ),
    "attempts that Redis has lost are given again": Hole(
        "claim", "if tonumber(job.queued_us) > since_us then", "if true then"
    ),
    "a suspect is cleared twice": Hole("clear", " or job.cleared", ""),
    "a log takes entries that leave a gap": Hole("append", "string.match(id, '%d+-') .. '*'", "id"),
    "a log that has its end expires": Hole(
        "append", "redis.call('PERSIST', log)", "redis.call('EXPIRE', log, 3600)"
    ),
    "an ended job expires before SQL has it": Hole(
        "state",
        "redis.call('HSET', job.key, 'ended_us', whole(at_us))",
        "redis.call('HSET', job.key, 'ended_us', whole(at_us))\n"
        "    redis.call('EXPIRE', job.key, 3600)",
    ),
    "the ledger is trimmed": Hole("state", "LEDGER, '*'", "LEDGER, 'MAXLEN', 5, '*'"),
    "a change is not recorded": Hole(
        "state",
        "ready_place(job), job.order)\n    end\n    record",
        "ready_place(job), job.order)\n        return\n    end\n    record",
    ),
    "jobs are taken though too many records wait": Hole(
        "submit", "redis.call('XLEN', LEDGER) >= tonumber(ARGV[8])", "false"
    ),
    "an accepted job is refused because its lane is full": Hole(
        "submit", "if step ~= 'queue' then", "if true then"
    ),
    "an accepted job takes another's idempotency key": Hole(
        "submit", "if fingerprint ~= '' and not other then", "if fingerprint ~= '' then"
    ),
    "a job is submitted twice": Hole(
        "submit", "if redis.call('EXISTS', JOB .. id) == 1 then return {id} end", ""
    ),
    "a cancellation whose reply was lost is not answered again": Hole(
        "cancel",
        "if not is_open(job) and job.state ~= 'cancelled' then",
        "if not is_open(job) then",
    ),
    "who leaves cancels another's job": Hole("cancel", "ARGV[2] == '1' and job.attached", "false"),
    "an older attempt finishes the job": Hole(
        "finish", "if job.attempt ~= ARGV[2] then return 0 end", ""
    ),
    "a finish whose reply was lost is void": Hole(
        "finish", "job.state == ARGV[3] and ended() or 0", "0"
    ),
    "an older attempt hands the job back": Hole(
        "requeue", "if job.attempt ~= ARGV[2] then return nil end", ""
    ),
    "a lease is renewed for an older attempt": Hole("renew", " and job[2] == ARGV[i + 1]", ""),
    "a worker that has sent a heartbeat since loses its leases": Hole(
        "lapse", "if redis.call('HGET', KEYS[1], 'beats') ~= ARGV[2] then return nil end", ""
    ),
    "the leases of others end with those of a worker that is gone": Hole(
        "lapse", " and job[2] == ARGV[1]", ""
    ),
    "a job stays in the place that it leaves": Hole(
        "state", "if job.place then redis.call('ZREM', job.place, job.id) end", ""
    ),
    "the reaper loses jobs whose delay is over": Hole("reap", "job.place ~= DELAYED", "true"),
    "a job that expires stays among the deadlines": Hole(
        "state", "    redis.call('ZREM', DEADLINES, job.id)\n", ""
    ),
    "an end is not counted": Hole("state", "    count('jobs', state, job)\n", ""),
    "bytes of bodies are counted for ever": Hole(
        "state", "redis.call('HINCRBY', BODY_BYTES, job.model, -(job.body_bytes or 0))", ""
    ),
    "bodies of ended jobs are kept": Hole("state", "redis.call('HDEL', job.key, 'body')", ""),
    "each job has a ticket": Hole(
        "state", "if redis.call('EXISTS', tickets) == 0 then", "if true then"
    ),
    "a tenant that was idle has credit": Hole(
        "fair", "exact(math.max(own, least(lane)))", "exact(own)"
    ),
    "the charge of an estimate stays": Hole(
        "fair", "if not cost then return end", "if cost then return end"
    ),
    "a job that was handed back is charged again": Hole(
        "fair", "if job.charged then return end", ""
    ),
    "a tenant keeps its turn without a job": Hole(
        "fair", "    redis.call('ZREM', turns, tenant)\n", ""
    ),
    "a tenant whose jobs wait loses its turn": Hole(
        "fair", "if redis.call('EXISTS', queue) == 1 then return end", ""
    ),
    "the counter of an idle tenant has no end": Hole(
        "fair", "counter, 'EX', SERVED_S)", "counter)"
    ),
    "records leave Redis before SQL has them": Hole(
        (Recorder, "_record"),
        "ended += self._apply(changes)",
        "self._redis.xdel(keys.LEDGER, *done, '0-1'); ended += self._apply(changes)",
    ),
    "a job is recorded with an end that does not count": Hole(
        (Recorder, "_outcome"),
        'outcome if outcome and outcome.state == fields[b"state"].decode() else None',
        "outcome",
    ),
    "a second end keeps a log that SQL has": Hole(
        "append", "if not (is_first and had_end(log)) then", "if true then"
    ),
    "recorded jobs never expire": Hole(
        (Recorder, "_record"),
        "self._settle({c.job.id: _tokens(c.result) for c in changes if c.result})",
        "pass",
    ),
    "a job whose answer is lost is completed": Hole(
        (Recorder, "_is_void"), "job.status != State.COMPLETED", "True"
    ),
    "an end of fewer attempts than SQL knows is not written": Hole(
        (records, "_update"), "job.completed_at is None:", "True:"
    ),
    "jobs that were lost plan no webhook": Hole(
        (records, "end_lost"), "_plan_webhooks(session, [job_id])", "pass"
    ),
    "an accepted job that Redis lost has to find room again": Hole(
        (accepted, "enqueue"),
        "backlog.queue(job, ",
        'backlog._put("submit" if dispatches else "queue", job, first_attempt=',
    ),
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("hole", HOLES.values(), ids=list(HOLES))
def test_the_model_finds(hole: Hole, make_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = {}
    if isinstance(hole.where, str):
        patches[hole.where] = [(hole.right, hole.wrong)]
    else:
        patch_function(monkeypatch, *hole.where, hole.right, hole.wrong)
    QueueMachine.done.clear()
    with make_world(patches) as world:
        QueueMachine.world = world
        with pytest.raises((AssertionError, KeyError)) as found:
            _take_steps()
    print(QueueMachine.done.total(), "steps:", str(found.value)[:300])


def _take_steps() -> None:
    for number in range(MOST_STEPS // STEPS_AT_ONCE):
        run(STEPS_AT_ONCE, number, [Phase.generate])


def patch_function(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, right: str, wrong: str
) -> None:
    """The function as it is, but for that line."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert right in source, f"{name} has changed: {right!r} is not in it any more"
    made: dict[str, Any] = {}
    exec(source.replace(right, wrong), function.__globals__, made)
    monkeypatch.setattr(owner, name, made[name])
