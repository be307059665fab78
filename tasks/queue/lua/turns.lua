-- Who waits in lanes: the tenants whose turn comes first.
-- ARGV: 1 at most, of each lane, 2... lanes as MODEL:LANE
-- Returns for each lane a list of {tenant, its counter (fair.lua), its jobs, the weight of the first}.
local found = {}
for i = 2, #ARGV do
    local turns = redis.call('ZRANGE', TURNS .. ARGV[i], 0, ARGV[1] - 1, 'WITHSCORES')
    local tenants = {}
    for j = 1, #turns, 2 do
        local queue = QUEUE .. ARGV[i] .. ':' .. turns[j]
        local first = redis.call('ZRANGE', queue, 0, 0)[1] or ''
        local weight = redis.call('HGET', JOB .. first, 'weight') or '1'
        tenants[#tenants + 1] = {turns[j], turns[j + 1], redis.call('ZCARD', queue), weight}
    end
    found[#found + 1] = tenants
end
return found
