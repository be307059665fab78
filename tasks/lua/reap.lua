-- Hands on the jobs whose lease has expired: back to where they stood in the backlog, or, after the
-- last attempt, to their end. And ends the jobs that have not started by their deadline.
-- KEYS: 1 leases (zset), 2 ledger (stream), 3 deadlines (zset)
-- ARGV: 1 prefix of job keys, 2 prefix of backlog keys, 3 retention in s, 4 at most
-- Returns a list of {id, model, attempt, listener, 'queued', 'failed' or 'expired'}.
local at_us = now_us()
local reaped = {}
local function due(zset)
    return ipairs(redis.call('ZRANGEBYSCORE', zset, '-inf', at_us, 'LIMIT', 0, ARGV[4]))
end

for _, id in due(KEYS[1]) do
    local key = ARGV[1] .. id
    local job = redis.call('HMGET', key,
        'state', 'attempt', 'model', 'lane', 'order', 'listener', 'last_attempt')
    redis.call('ZREM', KEYS[1], id)
    if job[1] == 'in_progress' then
        local state = 'queued'
        if tonumber(job[2]) >= tonumber(job[7]) then
            state = 'failed'
            end_job(key, KEYS[2], id, state, at_us, ARGV[3])
        else
            redis.call('ZADD', ARGV[2] .. job[3] .. ':' .. job[4], job[5], id)
            redis.call('HSET', key, 'state', state)
        end
        reaped[#reaped + 1] = {id, job[3], job[2], job[6], state}
    end
end

for _, id in due(KEYS[3]) do
    local key = ARGV[1] .. id
    local job = redis.call('HMGET', key, 'state', 'attempt', 'model', 'lane', 'listener')
    redis.call('ZREM', KEYS[3], id)
    if job[1] == 'queued' then
        redis.call('ZREM', ARGV[2] .. job[3] .. ':' .. job[4], id)
        end_job(key, KEYS[2], id, 'expired', at_us, ARGV[3])
        reaped[#reaped + 1] = {id, job[3], job[2], job[5], 'expired'}
    end
end
return reaped
