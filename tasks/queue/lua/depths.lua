-- How many jobs wait in each lane, and since when the oldest of them: one read of all lanes.
-- The first job of each priority is the oldest of its priority (depth.py defines the scores).
-- ARGV: 1 lowest priority, 2 scores between two priorities, 3... lanes as MODEL:LANE
-- Returns for each lane: its jobs, and the ms since the oldest of them was queued: 0 if there is none,
-- below 0 if the clock was set back since all of them were.
local now_ms = math.floor(now_us() / 1000)

local function oldest_ms_of(place)
    local oldest_ms, level = math.huge, -ARGV[1]
    while level do
        local head = redis.call('ZRANGEBYSCORE', place, string.format('%.0f', level * ARGV[2]), '+inf',
            'WITHSCORES', 'LIMIT', 0, 1)
        level = head[2] and math.floor(head[2] / ARGV[2])
        if level then
            oldest_ms = math.min(oldest_ms, head[2] - level * ARGV[2])
            level = level + 1
        end
    end
    return oldest_ms
end

local found = {}
for i = 3, #ARGV do
    local ready, suspects = BACKLOG .. ARGV[i], SUSPECTS .. ARGV[i]
    found[#found + 1] = redis.call('ZCARD', ready) + redis.call('ZCARD', suspects)
    local oldest_ms = math.min(oldest_ms_of(ready), oldest_ms_of(suspects))
    found[#found + 1] = oldest_ms == math.huge and 0 or now_ms - oldest_ms
end
return found
