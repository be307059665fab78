-- In front of the scripts that change a job's state: how a job ends, and the records of changes.
-- A record waits in a stream until maintenance has it in SQL. The bound is for a maintenance that
-- is away for very long: the oldest records go rather than Redis's memory (a million takes 200 MB).
local function now_us()
    local time = redis.call('TIME')
    return string.format('%d', time[1] * 1000000 + time[2])
end

local function record(key, ledger, id, state, at_us)
    local job = redis.call('HMGET', key, 'model', 'tenant', 'endpoint', 'lane', 'metadata',
        'attempt', 'queued_us', 'started_us', 'worker')
    redis.call('XADD', ledger, 'MAXLEN', '~', 1000000, '*', 'job_id', id, 'state', state,
        'model', job[1], 'tenant', job[2], 'endpoint', job[3], 'lane', job[4],
        'metadata', job[5] or '{}', 'attempts', job[6], 'queued_us', job[7],
        'started_us', job[8] or '', 'worker', job[9] or '', 'at_us', at_us)
end

local function end_job(key, ledger, id, state, at_us, retention_s)
    redis.call('HSET', key, 'state', state, 'ended_us', at_us)
    -- What did not succeed may be asked for once more.
    if state == 'completed' then redis.call('HDEL', key, 'body') end
    redis.call('EXPIRE', key, retention_s)
    record(key, ledger, id, state, at_us)
end
