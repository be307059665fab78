-- Queues a job at the end of its priority in its lane, and a ticket for it, unless the lane is full.
-- KEYS: 1 job hash, 2 backlog of the lane (zset), 3 set of models, 4 deadlines (zset),
--       5 tickets of the model (list), 6 idempotency key (string), used when ARGV 7 is not ''
-- ARGV: 1 job id, 2 model, 3 most jobs in the lane, 4 TTL of the job in s, 5 priority,
--       6 deadline in us from now ('': none), 7 fingerprint ('': none),
--       8 attempts before, 9 most failures, 10 ticket, 11... fields of the hash
-- Returns {id}; {} when the lane is full; {other id, its fingerprint} when the key is another job's.
-- Sent again after a lost reply: the job may be running already.
if redis.call('EXISTS', KEYS[1]) == 1 then return {ARGV[1]} end
if ARGV[7] ~= '' then
    local held = redis.call('GET', KEYS[6])
    if held then
        local fingerprint, id = string.match(held, '^(%S+) (%S+)$')
        return {id, fingerprint}
    end
end
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[3]) then return {} end
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
-- Order of service: priority first, then time, in ms so that a double holds both exactly.
local order = string.format('%.3f', ARGV[5] * 1e13 + math.floor(now_us / 1000))
redis.call('HSET', KEYS[1], 'state', 'queued', 'attempt', ARGV[8], 'order', order,
    'max_failures', ARGV[9], 'queued_us', string.format('%d', now_us), unpack(ARGV, 11))
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], order, ARGV[1])
redis.call('SADD', KEYS[3], ARGV[2])
redis.call('LPUSH', KEYS[5], ARGV[10])
count('jobs', 'queued', ARGV[2], string.match(KEYS[2], '[^:]+$'))
if ARGV[6] ~= '' then
    local deadline_us = string.format('%d', now_us + ARGV[6])
    redis.call('HSET', KEYS[1], 'deadline_us', deadline_us)
    redis.call('ZADD', KEYS[4], deadline_us, ARGV[1])
end
if ARGV[7] ~= '' then
    redis.call('SET', KEYS[6], ARGV[7] .. ' ' .. ARGV[1], 'EX', ARGV[4])
end
return {ARGV[1]}
