-- Hands on the jobs whose lease has expired: back to where they stood in the backlog, or, after their
-- last failure, to their end. Ends the jobs that have not started by their deadline. And puts those
-- back in the backlog whose delay is over.
-- KEYS: 1 leases (zset), 2 ledger (stream), 3 deadlines (zset), 4 delayed (zset)
-- ARGV: 1 prefix of job keys, 2 prefix of backlog keys, 3 retention in s, 4 at most
-- Returns a list of {id, model, tenant, attempt, listener, 'queued', 'failed' or 'expired'}.
local at_us = now_us()
local reaped = {}
local keys = {leases = KEYS[1], ledger = KEYS[2], delayed = KEYS[4], backlogs = ARGV[2]}
local function due(zset)
    return ipairs(redis.call('ZRANGEBYSCORE', zset, '-inf', at_us, 'LIMIT', 0, ARGV[4]))
end

for _, id in due(KEYS[1]) do
    local key = ARGV[1] .. id
    local job = redis.call('HMGET', key, 'state', 'attempt', 'model', 'lane', 'order', 'failures',
        'max_failures', 'listener', 'worker', 'tenant')
    redis.call('ZREM', KEYS[1], id)
    if job[1] == 'in_progress' then
        local reason = 'worker ' .. (job[9] or '') .. ' fell silent'
        local state = requeue(key, id, {unpack(job, 2)}, keys, at_us, ARGV[3],
            reason, 'lease_expired', 0)
        reaped[#reaped + 1] = {id, job[3], job[10] or '', job[2], job[8], state}
    end
end

for _, id in due(KEYS[3]) do
    local key = ARGV[1] .. id
    local job = redis.call('HMGET', key, 'state', 'attempt', 'model', 'lane', 'listener', 'tenant')
    redis.call('ZREM', KEYS[3], id)
    if job[1] == 'queued' then
        redis.call('ZREM', ARGV[2] .. job[3] .. ':' .. job[4], id)
        end_job(key, KEYS[2], id, 'expired', at_us, ARGV[3])
        reaped[#reaped + 1] = {id, job[3], job[6] or '', job[2], job[5], 'expired'}
    end
end

for _, id in due(KEYS[4]) do
    local job = redis.call('HMGET', ARGV[1] .. id, 'state', 'attempt', 'model', 'lane', 'order',
        'listener', 'tenant')
    redis.call('ZREM', KEYS[4], id)
    if job[1] == 'queued' then
        redis.call('ZADD', ARGV[2] .. job[3] .. ':' .. job[4], job[5], id)
        reaped[#reaped + 1] = {id, job[3], job[7] or '', job[2], job[6], 'queued'}
    end
end
return reaped
