-- Cancels a job in whatever state it is.
-- KEYS: 1 job hash, 2 leases (zset), 3 ledger (stream),
--       4... where it may wait: deadlines, delayed, backlogs of its model (zsets)
-- ARGV: 1 id, 2 retention in s
-- Returns {tenant, attempt, worker or '', listener}, or nil when the job has ended or does not exist.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'worker', 'listener', 'tenant')
if job[1] ~= 'queued' and job[1] ~= 'in_progress' then return nil end
redis.call('ZREM', KEYS[2], ARGV[1])
for place = 4, #KEYS do redis.call('ZREM', KEYS[place], ARGV[1]) end
end_job(KEYS[1], KEYS[3], ARGV[1], 'cancelled', now_us(), ARGV[2])
return {job[5] or '', job[2], job[1] == 'in_progress' and job[3] or '', job[4] or ''}
