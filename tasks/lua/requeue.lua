-- Hands a job back that the caller still holds: it could not finish it.
-- KEYS: 1 job hash, 2 leases (zset), 3 ledger (stream), 4 delayed (zset), 5 tickets of its model (list)
-- ARGV: 1 id, 2 attempt, 3 prefix of backlog keys, 4 retention in s, 5 reason,
--       6 cause (counts.py), 7 delay in us, 8 a ticket
-- Returns 'queued' or 'failed', or nil when the attempt is not the current one or the job has ended.
local job = redis.call('HMGET', KEYS[1],
    'state', 'attempt', 'model', 'lane', 'order', 'failures', 'max_failures')
if job[1] ~= 'in_progress' or job[2] ~= ARGV[2] then return nil end
local keys = {leases = KEYS[2], ledger = KEYS[3], delayed = KEYS[4], backlogs = ARGV[3]}
local delay_us = tonumber(ARGV[7])
local state = requeue(KEYS[1], ARGV[1], {unpack(job, 2)}, keys, now_us(), ARGV[4], ARGV[5],
    ARGV[6], delay_us)
if state == 'queued' and delay_us == 0 then redis.call('LPUSH', KEYS[5], ARGV[8]) end
return state
