-- How often interactive jobs of a model come: batch jobs leave slots free for those that are to be
-- expected, before it takes a preemption.

-- When the last one came, and the mean time between two, lately.
local function arrivals(model)
    local last_us, gap_us = string.match(redis.call('GET', ARRIVED .. model) or '', '^(%d+) (%d+)$')
    return tonumber(last_us), tonumber(gap_us)
end

local function note_arrival(model, at_us)
    local last_us, gap_us = arrivals(model)
    gap_us = gap_us and gap_us + (at_us - last_us - gap_us) / 8 or RESERVE_S * 1e6
    redis.call('SET', ARRIVED .. model, whole(at_us) .. ' ' .. whole(gap_us), 'EX', RESERVE_S)
end

-- How many may come in the next seconds; 0: none has come for a while.
local function arrivals_soon(model, at_us)
    local last_us, gap_us = arrivals(model)
    if not last_us then return 0 end
    return 1 + math.floor(SOON_S * 1e6 / math.max(gap_us, at_us - last_us, 1))
end

