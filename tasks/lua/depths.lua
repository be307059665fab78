-- How many jobs wait in each lane, and since when the oldest of them: one look at all lanes.
-- The first job of each priority is the oldest of its priority (depth.py tells how scores are made).
-- KEYS: lanes (zsets)
-- ARGV: 1 lowest priority, 2 scores between two priorities
-- Returns for each lane: its jobs, and the ms since the oldest of them was queued (0: there is none).
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local found = {}
for _, lane in ipairs(KEYS) do
    local oldest_ms, level = now_ms, -ARGV[1]
    while level do
        local head = redis.call('ZRANGEBYSCORE', lane, string.format('%.0f', level * ARGV[2]), '+inf',
            'WITHSCORES', 'LIMIT', 0, 1)
        level = head[2] and math.floor(head[2] / ARGV[2])
        if level then
            oldest_ms = math.min(oldest_ms, head[2] - level * ARGV[2])
            level = level + 1
        end
    end
    found[#found + 1] = redis.call('ZCARD', lane)
    found[#found + 1] = now_ms - oldest_ms
end
return found
