-- In front of every script that changes a job (keys.py has the keys' names and content, docs/queue.md
-- the state machine). An open job is in exactly one place, a zset that its hash names; state and
-- place change together, in `move` alone.
local FIELDS = {'state', 'place', 'attempt', 'model', 'lane', 'tenant', 'endpoint', 'metadata', 'order',
    'failures', 'max_failures', 'cleared', 'sequences', 'weight', 'max_tokens', 'charged', 'body_bytes', 'key_id',
    'listener', 'attached', 'worker', 'queued_us', 'requeued_us', 'started_us', 'deadline_us', 'is_dead',
    'traceparent'}

-- The job as a table; without a state when there is no such job.
local function read_job(id)
    local values = redis.call('HMGET', JOB .. id, unpack(FIELDS))
    local job = {id = id, key = JOB .. id}
    for i, name in ipairs(FIELDS) do job[name] = values[i] or nil end
    return job
end

local function is_open(job)
    return job.state == 'queued' or job.state == 'in_progress'
end

-- Counts what happened (counts.py has the names).
local function count(what, value, job)
    redis.call('HINCRBY', COUNTS, what .. ' ' .. value .. ' ' .. job.lane .. ' ' .. job.model, 1)
end

-- Notes a change for SQL. The record waits in a stream until maintenance has committed it; it is never
-- trimmed: submit.lua refuses new jobs when too many wait. Returns its id.
local function record(job, at_us, reason)
    return redis.call('XADD', LEDGER, '*', 'job_id', job.id, 'state', job.state,
        'model', job.model, 'tenant', job.tenant, 'endpoint', job.endpoint, 'lane', job.lane,
        'metadata', job.metadata or '{}', 'attempts', job.attempt, 'queued_us', job.queued_us,
        'started_us', job.started_us or '', 'worker', job.worker or '', 'at_us', whole(at_us),
        'reason', reason or '', 'is_dead', job.is_dead or '')
end

-- Gives the job a new state and its place; no place means that it has ended.
local function move(job, state, place, score)
    local backlog = BACKLOG .. lane_of(job)
    if job.place then redis.call('ZREM', job.place, job.id) end
    if job.place == backlog then leave(lane_of(job), job.tenant, job.id) end
    if place == backlog then enter(job, score) end
    if place then
        redis.call('ZADD', place, score, job.id)
        redis.call('HSET', job.key, 'state', state, 'place', place)
    else
        redis.call('HSET', job.key, 'state', state)
        redis.call('HDEL', job.key, 'place')
    end
    job.state, job.place = state, place
    note_waiting(job, state == 'queued')
end

-- Where a queued job waits that may run now. One whose next failure is its last is a suspect: it may be
-- what kills its workers.
local function ready_place(job)
    local failures = tonumber(job.failures or 0)
    local is_suspect = failures > 0 and failures + 1 >= tonumber(job.max_failures)
    return (is_suspect and SUSPECTS or BACKLOG) .. lane_of(job)
end

-- Only a job that has never started can miss its deadline.
local function drop_deadline(job)
    if not job.deadline_us then return end
    redis.call('ZREM', DEADLINES, job.id)
    redis.call('HDEL', job.key, 'deadline_us')
    job.deadline_us = nil
end

-- Ends an open job. Its hash and log stay until SQL has them (settle.lua), its body only if it is a dead
-- letter, which SQL is still to get. `tokens`: of prompt and answer, nil if they are not known.
local function end_job(job, state, at_us, reason, is_dead, tokens)
    correct(job, tokens, at_us)
    free_places(job.id, job.tenant, job.key_id)
    -- What it has used of the engine without an end, its log knows: settle.lua.
    if tokens or not job.started_us then settle_cost(job.id, tokens or 0, at_us) end
    drop_deadline(job)
    move(job, state)
    redis.call('HSET', job.key, 'ended_us', whole(at_us))
    redis.call('HINCRBY', BODY_BYTES, job.model, -(job.body_bytes or 0))
    if is_dead then
        job.is_dead = '1'
        redis.call('HSET', job.key, 'is_dead', '1')
        count('dead', 'letter', job)
    else
        redis.call('HDEL', job.key, 'body')
    end
    redis.call('HSET', job.key, 'record', record(job, at_us, reason))
    count('jobs', state, job)
end

-- Takes a running job from its worker: back to where it stood, now or after a delay; or to its end as a
-- dead letter, when it has failed too often. `cause` is one of contract/job.py's.
local function requeue(job, at_us, cause, reason, delay_us)
    count('requeues', cause, job)
    local is_failure = cause ~= 'handed_back' and cause ~= 'preempted'
    if is_failure then
        job.failures = redis.call('HINCRBY', job.key, 'failures', 1)
        if job.failures >= tonumber(job.max_failures) then
            return end_job(job, 'failed', at_us, reason, true)
        end
    end
    redis.call('HSET', job.key, 'requeued_us', whole(at_us))
    if delay_us > 0 then
        move(job, 'queued', DELAYED, whole(at_us + delay_us))
    else
        move(job, 'queued', ready_place(job), job.order)
    end
    record(job, at_us, reason)
end

-- Wakes a worker of the model that has room, unless a ticket waits already: who takes that one finds all
-- that waits by then, and claims that leave something behind wake the next. A worker that has seen a job
-- through takes another one without a ticket.
local function wake(model, ticket)
    local tickets = TICKETS .. model
    if redis.call('EXISTS', tickets) == 0 then redis.call('LPUSH', tickets, ticket) end
end

-- When this run of Redis was seen first, 0: there was none before.
local function started_us(at_us)
    local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
    local known, since_us = string.match(redis.call('GET', RUN) or '', '^(%x+) (%d+)$')
    if known == run then return tonumber(since_us) end
    redis.call('SET', RUN, run .. ' ' .. (known and whole(at_us) or 0))
    return known and at_us or 0
end
