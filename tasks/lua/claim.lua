-- Takes the first job of the first lane that has one, and leases it to a worker.
-- KEYS: 1 leases (zset), 2 ledger (stream), 3 deadlines (zset),
--       4... backlogs of the model (zsets), in the order of service
-- ARGV: 1 worker, 2 lease in us, 3 prefix of job keys, 4... fields of the hash to return
-- Returns nil when nothing is queued, else {id, attempt, queue_ms, fields...}.
local at_us = now_us()
for lane = 4, #KEYS do
    local popped = redis.call('ZPOPMIN', KEYS[lane])
    while popped[1] do
        local id = popped[1]
        local key = ARGV[3] .. id
        local job = redis.call('HMGET', key, 'state', 'queued_us', 'deadline_us')
        local is_late = job[3] and tonumber(job[3]) <= tonumber(at_us)
        -- A job whose hash expired, or that ended otherwise, is passed over; one that is late too:
        -- the reaper ends it.
        if job[1] == 'queued' and not is_late then
            redis.call('ZREM', KEYS[3], id)
            local attempt = redis.call('HINCRBY', key, 'attempt', 1)
            redis.call('HSET', key, 'state', 'in_progress', 'worker', ARGV[1],
                'started_us', at_us)
            redis.call('ZADD', KEYS[1], string.format('%d', at_us + ARGV[2]), id)
            record(key, KEYS[2], id, 'in_progress', at_us)
            local reply = redis.call('HMGET', key, unpack(ARGV, 4))
            table.insert(reply, 1, string.format('%d', (at_us - job[2]) / 1000))
            table.insert(reply, 1, tostring(attempt))
            table.insert(reply, 1, id)
            return reply
        end
        popped = redis.call('ZPOPMIN', KEYS[lane])
    end
end
return nil
