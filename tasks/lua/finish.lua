-- Ends a job that the caller still holds.
-- KEYS: 1 job hash, 2 leases (zset), 3 ledger (stream), 4 mean service time of its model (string)
-- ARGV: 1 id, 2 attempt, 3 final state, 4 retention in s, 5 why it is a dead letter ('': it is none)
-- Returns 1, or 0 when the attempt is not the current one or the job has ended: the caller's
-- result is then void.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'started_us')
if job[1] ~= 'in_progress' or job[2] ~= ARGV[2] then return 0 end
local at_us = now_us()
if ARGV[5] ~= '' then redis.call('HSET', KEYS[1], 'is_dead', '1') end
end_job(KEYS[1], KEYS[3], ARGV[1], ARGV[3], at_us, ARGV[4], ARGV[5])
redis.call('ZREM', KEYS[2], ARGV[1])
if ARGV[3] == 'completed' then
    local took_us = at_us - job[3]
    local mean_us = tonumber(redis.call('GET', KEYS[4])) or took_us
    redis.call('SET', KEYS[4], string.format('%d', mean_us + (took_us - mean_us) * 0.05))
end
return 1
