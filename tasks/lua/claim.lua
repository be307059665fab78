-- Takes the first job of the first lane that has one, and leases it to a worker.
-- A suspect, a job whose next failure is its last, may be what kills its workers: a worker runs one
-- of them at a time, so that none dies of another's doing.
-- KEYS: 1 leases (zset), 2 ledger (stream), 3 deadlines (zset), 4 paused models (set),
--       5 the worker's suspect (string), 6... backlogs of the model (zsets), in the order of service
-- ARGV: 1 worker, 2 lease in us, 3 prefix of job keys, 4 model, 5... fields of the hash to return
-- Returns nil when nothing is to be done, else {id, attempt, queue_ms, fields...}.
if redis.call('SISMEMBER', KEYS[4], ARGV[4]) == 1 then return nil end
local at_us = now_us()

local function runs_a_suspect()
    local id = redis.call('GET', KEYS[5])
    if not id then return false end
    local job = redis.call('HMGET', ARGV[3] .. id, 'state', 'worker')
    return job[1] == 'in_progress' and job[2] == ARGV[1]
end

local function claim(id, key, job)
    redis.call('ZREM', KEYS[3], id)
    local attempt = redis.call('HINCRBY', key, 'attempt', 1)
    redis.call('HSET', key, 'state', 'in_progress', 'worker', ARGV[1], 'started_us', at_us)
    redis.call('ZADD', KEYS[1], string.format('%d', at_us + ARGV[2]), id)
    count('jobs', 'in_progress', record(key, KEYS[2], id, 'in_progress', at_us))
    local reply = redis.call('HMGET', key, unpack(ARGV, 5))
    table.insert(reply, 1, string.format('%d', (at_us - job[2]) / 1000))
    table.insert(reply, 1, tostring(attempt))
    table.insert(reply, 1, id)
    return reply
end

-- The first job of the lane that this worker may run; suspects that it may not stay where they are.
local function take(lane)
    local passed, reply = {}, nil
    local popped = redis.call('ZPOPMIN', lane)
    while popped[1] and not reply do
        local id, key = popped[1], ARGV[3] .. popped[1]
        local job = redis.call('HMGET', key,
            'state', 'queued_us', 'deadline_us', 'failures', 'max_failures')
        local is_late = job[3] and tonumber(job[3]) <= tonumber(at_us)
        -- A job whose hash expired, or that ended otherwise, is passed over; one that is late too:
        -- the reaper ends it.
        if job[1] == 'queued' and not is_late then
            local failures = tonumber(job[4] or 0)
            local is_suspect = failures > 0 and failures + 1 >= tonumber(job[5])
            if is_suspect and runs_a_suspect() then
                passed[#passed + 1] = popped[2]
                passed[#passed + 1] = id
            else
                if is_suspect then redis.call('SET', KEYS[5], id, 'EX', 86400) end
                reply = claim(id, key, job)
            end
        end
        if not reply then popped = redis.call('ZPOPMIN', lane) end
    end
    if #passed > 0 then redis.call('ZADD', lane, unpack(passed)) end
    return reply
end

for lane = 6, #KEYS do
    local reply = take(KEYS[lane])
    if reply then return reply end
end
return nil
