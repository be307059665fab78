-- Renews a worker's leases.
-- KEYS: 1 leases (zset)
-- ARGV: 1 lease in us, 2 prefix of job keys, then id and attempt of each job
-- Returns the ids that this worker no longer holds: cancelled, or handed to another.
local time = redis.call('TIME')
local expiry_us = string.format('%d', time[1] * 1000000 + time[2] + ARGV[1])
local lost = {}
for i = 3, #ARGV, 2 do
    local job = redis.call('HMGET', ARGV[2] .. ARGV[i], 'state', 'attempt')
    if job[1] == 'in_progress' and job[2] == ARGV[i + 1] then
        redis.call('ZADD', KEYS[1], expiry_us, ARGV[i])
    else
        lost[#lost + 1] = ARGV[i]
    end
end
return lost
