"""The invariants of Redis, checked after each step: one script reads all that it holds."""

from typing import Any

from redis import Redis

from tasks.contract import keys
from tests.model.expected import DELAYED, LEASES, Expected, Log, QueuedJob

_FIELDS = (
    *("state", "place", "attempt", "failures", "cleared", "deadline_us", "attached", "worker"),
    *("is_dead", "body_bytes", "sequences", "charged"),
)

_READ = f"""
redis.call('INCRBY', 'model:now_us', ARGV[1])
local found = {{}}
for _, key in ipairs(redis.call('KEYS', 'sluice:*')) do
    local kind = redis.call('TYPE', key).ok
    local has_ttl = redis.call('PTTL', key) >= 0 and 1 or 0
    local value = ''
    if string.sub(key, 1, {len(keys.JOB_PREFIX)}) == '{keys.JOB_PREFIX}' then
        value = redis.call('HMGET', key, {", ".join(map(repr, _FIELDS))})
        value[#value + 1] = redis.call('HEXISTS', key, 'body')
    elseif kind == 'zset' then value = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
    elseif kind == 'hash' then value = redis.call('HGETALL', key)
    elseif kind == 'set' then value = redis.call('SMEMBERS', key)
    elseif kind == 'list' then value = redis.call('LLEN', key)
    elseif kind == 'stream' and key == '{keys.LEDGER}' then
        value = redis.call('XRANGE', key, '-', '+')
    elseif kind == 'stream' then
        local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
        value = {{redis.call('XLEN', key), last and last[1] or ''}}
    else value = redis.call('GET', key) end
    found[#found + 1] = {{key, has_ttl, value}}
end
return found
"""

_PLACES = (
    *(keys.BACKLOG_PREFIX, keys.SUSPECTS_PREFIX, keys.QUEUE_PREFIX, keys.TURNS_PREFIX),
    *(keys.TICKETS_PREFIX, keys.SERVICE_PREFIX, keys.LEVEL_PREFIX, keys.TOKENS_PREFIX),
)
_LASTING = {keys.COUNTS, keys.MODELS, keys.PAUSED, keys.BODY_BYTES, keys.RUN}


class Checks:
    """Compares Redis with the model, and both with the guarantees."""

    def __init__(self, raw: Redis) -> None:
        self._read = raw.register_script(_READ)

    def check(self, expected: Expected, tick_us: int) -> None:
        """Raises AssertionError; moves the clock on by a tick when all is well."""
        found = {
            key.decode(): (bool(has_ttl), value)
            for key, has_ttl, value in self._read(args=[tick_us])
        }
        _check_places(found, expected)
        _check_jobs(found, expected)
        _check_logs(found, expected)
        _check_counters(found, expected)
        _check_turns(found, expected)
        _check_ledger(found, expected)
        _check_ends(found, expected)


Found = dict[str, tuple[bool, Any]]


def _check_places(found: Found, expected: Expected) -> None:
    """Every open job stands in one place, the one that it names; nothing else stands anywhere."""
    standing: dict[str, list[tuple[str, float]]] = {}
    for key, (_, value) in found.items():
        if key in (LEASES, DELAYED) or key.startswith((keys.BACKLOG_PREFIX, keys.SUSPECTS_PREFIX)):
            for member, score in zip(value[::2], value[1::2], strict=True):
                standing.setdefault(member.decode(), []).append((key, float(score)))
    for job in expected.jobs.values():
        wanted = [(job.place, job.score)] if job.is_open else []
        got = standing.pop(job.id, [])
        assert got == wanted, f"{job} stands in {got}"
    assert not standing, f"what is no open job stands in {standing}"
    listed = _members(found, keys.DEADLINES)
    deadlines = {job.id: job.deadline_us for job in expected.jobs.values() if job.deadline_us}
    assert listed == deadlines, f"deadlines are {listed}; they should be {deadlines}"


def _members(found: Found, key: str) -> dict[str, float]:
    _, value = found.get(key, (False, []))
    pairs = zip(value[::2], value[1::2], strict=True)
    return {member.decode(): float(score) for member, score in pairs}


def _check_jobs(found: Found, expected: Expected) -> None:
    hashes = {key for key in found if key.startswith(keys.JOB_PREFIX)}
    known = {keys.job(job_id) for job_id in expected.jobs}
    assert hashes == known, f"Redis alone has {hashes - known}, the model {known - hashes}"
    for job in expected.jobs.values():
        has_ttl, values = found[keys.job(job.id)]
        got = [value.decode() if isinstance(value, bytes) else value for value in values]
        got[3] = got[3] or "0"
        wanted = _fields(job)
        assert got == wanted, f"{job.id} is {got}; it should be {wanted}"
        assert has_ttl == job.may_expire, f"{job} has a TTL: {has_ttl}"


def _fields(job: QueuedJob) -> list[Any]:
    return [
        *(job.state, job.place, str(job.attempt), str(job.failures)),
        *("1" if job.cleared else None, str(job.deadline_us) if job.deadline_us else None),
        *("1" if job.attached else None, job.worker or None, "1" if job.is_dead else None),
        *(str(job.body_bytes), str(job.sequences)),
        None if job.charged is None else f"{job.charged:.17g}",
        int(job.has_body),
    ]


def _check_logs(found: Found, expected: Expected) -> None:
    got = {
        key.removeprefix(keys.LOG_PREFIX): (has_ttl, value[0], value[1].decode())
        for key, (has_ttl, value) in found.items()
        if key.startswith(keys.LOG_PREFIX)
    }
    wanted = {job_id: _summary(log) for job_id, log in expected.logs.items()}
    assert got == wanted, f"logs are {got}; they should be {wanted}"


def _summary(log: Log) -> tuple[bool, int, str]:
    attempt, seq = log.last or (0, 0)
    return log.has_ttl, len(log.entries), f"{attempt}-{seq}"


def _check_counters(found: Found, expected: Expected) -> None:
    """Counters equal what happened; bytes, the bodies that are there."""
    for key, wanted in ((keys.COUNTS, expected.counts), (keys.BODY_BYTES, expected.body_bytes)):
        _, value = found.get(key, (False, []))
        names = [name.decode() for name in value[::2]]
        got = {name: int(n) for name, n in zip(names, value[1::2], strict=True) if int(n)}
        assert got == {name: n for name, n in wanted.items() if n}, f"{key}: {got}, not {wanted}"
    open_bytes: dict[str, int] = {}
    for job in expected.jobs.values():
        if job.is_open:
            open_bytes[job.model] = open_bytes.get(job.model, 0) + job.body_bytes
    assert open_bytes == {m: n for m, n in expected.body_bytes.items() if n}
    for model, tickets in expected.tickets.items():
        _, waiting = found.get(keys.tickets(model), (False, 0))
        assert waiting == tickets, f"{waiting} tickets of {model}; they should be {tickets}"


def _check_turns(found: Found, expected: Expected) -> None:
    """Who waits has a turn, with the service that was charged; who does not has none."""
    queues: dict[str, dict[str, float]] = {}
    waiting: dict[str, set[str]] = {}
    for job in expected.jobs.values():
        if job.place == job.backlog:
            queues.setdefault(keys.queue(job.model, job.lane, job.tenant), {})[job.id] = job.order
            waiting.setdefault(keys.turns(job.model, job.lane), set()).add(job.tenant)
    got = {key: _members(found, key) for key in found if key.startswith(keys.QUEUE_PREFIX)}
    assert got == queues, f"queues of tenants are {got}; they should be {queues}"
    got = {key: _members(found, key) for key in found if key.startswith(keys.TURNS_PREFIX)}
    assert {key: set(turns) for key, turns in got.items()} == waiting, f"{got}, not {waiting}"
    turns = {_turns_of(backlog): turns for backlog, turns in expected.fair.turns.items() if turns}
    assert got == turns, f"turns are {got}; they should be {turns}"
    served = {key: found[key] for key in found if key.startswith(keys.SERVED_PREFIX)}
    assert all(has_ttl for has_ttl, _ in served.values()), f"{served} has no end"
    idle = {key: float(value) for key, (_, value) in served.items()}
    wanted = {k: float(v) for k, v in expected.keys.items() if k.startswith(keys.SERVED_PREFIX)}
    assert idle == wanted, f"idle tenants have {idle}; they should have {wanted}"


def _turns_of(backlog: str) -> str:
    return keys.TURNS_PREFIX + backlog.removeprefix(keys.BACKLOG_PREFIX)


def _check_ledger(found: Found, expected: Expected) -> None:
    _, entries = found.get(keys.LEDGER, (False, []))
    assert len(entries) == len(expected.ledger), f"{len(entries)} records, not {expected.ledger}"
    for (record_id, fields), record in zip(entries, expected.ledger, strict=True):
        record.record_id = record_id.decode()
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        got = (values[b"job_id"].decode(), values[b"state"].decode(), int(values[b"attempts"]))
        wanted = (record.job_id, record.state, record.attempt)
        assert got == wanted, f"the ledger has {got}; it should have {wanted}"


def _check_ends(found: Found, expected: Expected) -> None:
    """Every key has an end, or belongs to a job that has not; what SQL lacks does not expire."""
    waiting = {record.job_id for record in expected.ledger}
    for job in expected.jobs.values():
        if not job.is_open and not job.may_expire:
            assert job.id in waiting, f"{job} has ended, and nobody will record it"
    for key, (has_ttl, _) in found.items():
        if not has_ttl and not key.startswith((keys.JOB_PREFIX, keys.LOG_PREFIX)):
            assert key in _LASTING or key == keys.LEDGER or _is_place(key), f"{key} has no end"


def _is_place(key: str) -> bool:
    return key in (LEASES, DELAYED, keys.DEADLINES) or key.startswith(_PLACES)
