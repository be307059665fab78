-- In front of the scripts that change a job's state: how a job ends or goes back to the backlog, and
-- the records of changes. A record waits in a stream until maintenance has it in SQL. The bound is
-- for a maintenance that is away for very long: the oldest records go rather than Redis's memory
-- (a million takes 200 MB).
local function now_us()
    local time = redis.call('TIME')
    return string.format('%d', time[1] * 1000000 + time[2])
end

-- Returns the job's model, lane, and whether it is a dead letter.
local function record(key, ledger, id, state, at_us, reason)
    local job = redis.call('HMGET', key, 'model', 'tenant', 'endpoint', 'lane', 'metadata',
        'attempt', 'queued_us', 'started_us', 'worker', 'is_dead')
    redis.call('XADD', ledger, 'MAXLEN', '~', 1000000, '*', 'job_id', id, 'state', state,
        'model', job[1], 'tenant', job[2], 'endpoint', job[3], 'lane', job[4],
        'metadata', job[5] or '{}', 'attempts', job[6], 'queued_us', job[7],
        'started_us', job[8] or '', 'worker', job[9] or '', 'at_us', at_us,
        'reason', reason or '', 'is_dead', job[10] or '')
    return job[1], job[4], job[10]
end

-- Counts what happened to a job (counts.py has the names).
local function count(what, value, model, lane)
    redis.call('HINCRBY', COUNTS, what .. ' ' .. value .. ' ' .. lane .. ' ' .. model, 1)
end

local function end_job(key, ledger, id, state, at_us, retention_s, reason)
    redis.call('HSET', key, 'state', state, 'ended_us', at_us)
    -- What did not succeed may be asked for once more.
    if state == 'completed' then redis.call('HDEL', key, 'body') end
    redis.call('EXPIRE', key, retention_s)
    local model, lane, is_dead = record(key, ledger, id, state, at_us, reason)
    count('jobs', state, model, lane)
    if is_dead then count('dead', 'letter', model, lane) end
end

-- Takes a running job from its worker: back to where it stood in the backlog, now or after a delay;
-- or to its end as a dead letter, when it has failed too often. Returns its new state.
-- `job` is its {attempt, model, lane, order, failures, max_failures}; `cause` is one of counts.py's.
local function requeue(key, id, job, keys, at_us, retention_s, reason, cause, delay_us)
    local is_failure = cause ~= 'handed_back'
    redis.call('ZREM', keys.leases, id)
    count('requeues', cause, job[2], job[3])
    local failures = tonumber(job[5] or 0) + (is_failure and 1 or 0)
    redis.call('HSET', key, 'failures', failures)
    if is_failure and failures >= tonumber(job[6]) then
        redis.call('HSET', key, 'is_dead', '1')
        end_job(key, keys.ledger, id, 'failed', at_us, retention_s, reason)
        return 'failed'
    end
    redis.call('HSET', key, 'state', 'queued')
    if delay_us > 0 then
        redis.call('ZADD', keys.delayed, string.format('%d', at_us + delay_us), id)
    else
        redis.call('ZADD', keys.backlogs .. job[2] .. ':' .. job[3], job[4], id)
    end
    record(key, keys.ledger, id, 'queued', at_us, reason)
    return 'queued'
end
