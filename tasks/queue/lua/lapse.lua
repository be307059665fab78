-- Ends the leases of a worker that is gone, before their time: the reaper hands its jobs on. If it lives after
-- all and renews one before the reaper comes, it keeps that one.
-- KEYS: 1 the worker's heartbeat (hash)
-- ARGV: 1 worker, 2 the number of its last heartbeat, as the caller has seen it, 3... ids of running jobs
-- Returns how many leases it has ended; nil when the worker has sent a heartbeat since, or its last has expired.
if redis.call('HGET', KEYS[1], 'beats') ~= ARGV[2] then return nil end
local ended = 0
for i = 3, #ARGV do
    local job = redis.call('HMGET', JOB .. ARGV[i], 'state', 'worker')
    if job[1] == 'in_progress' and job[2] == ARGV[1] then
        ended = ended + redis.call('ZADD', LEASES, 'XX', 'LT', 'CH', 0, ARGV[i])
    end
end
return ended
