-- Renews a worker's leases.
-- ARGV: 1 lease in us, then id and attempt of each job
-- Returns the positions (from 1) of those that this worker no longer holds: cancelled, or handed on.
local expiry_us = whole(now_us() + ARGV[1])
local lost = {}
for i = 2, #ARGV, 2 do
    local job = redis.call('HMGET', JOB .. ARGV[i], 'state', 'attempt')
    if job[1] == 'in_progress' and job[2] == ARGV[i + 1] then
        redis.call('ZADD', LEASES, 'XX', expiry_us, ARGV[i])
    else
        lost[#lost + 1] = i / 2
    end
end
return lost
