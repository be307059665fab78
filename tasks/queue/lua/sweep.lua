-- Compares jobs with the places that they should be in, and repairs inconsistencies. It finds nothing
-- unless a script or Redis itself has failed.
-- ARGV: 1 place whose members these are ('': jobs from elsewhere), 2 whether they are open in SQL: 'open',
--       'still open' (asked after they were found doubtful), '' (not asked), 3... ids
-- Returns for each id: 'missing', 'open', 'ended', or the repair: 'misplaced', 'stray', 'unrecorded';
-- or 'doubtful': it has ended and its record is gone, so SQL knows that by now, if it was told.
local at_us = now_us()
local from, in_sql = ARGV[1], ARGV[2]

local function repaired(kind)
    redis.call('HINCRBY', COUNTS, 'repairs ' .. kind .. '  ', 1)
    return kind
end

local function places(job)
    local lane = lane_of(job)
    return {BACKLOG .. lane, SUSPECTS .. lane, DELAYED, LEASES}
end

-- A job is in its tenant's queue while it is in the backlog. An older version knew no such queues.
local function check_queue(job)
    local lane = lane_of(job)
    local is_there = redis.call('ZSCORE', QUEUE .. lane .. ':' .. job.tenant, job.id)
    if job.place ~= BACKLOG .. lane then
        if not is_there then return nil end
        leave(lane, job.tenant, job.id)
        return 'stray'
    end
    if is_there and redis.call('ZSCORE', TURNS .. lane, job.tenant) then return nil end
    enter(job, job.order)
    return job.weight and 'misplaced'
end

-- An open job is in the place that it names, and in no other.
local function check_open(job)
    local found = 'open'
    for _, place in ipairs(places(job)) do
        if place ~= job.place and redis.call('ZREM', place, job.id) == 1 then found = 'stray' end
    end
    local is_there = job.place and redis.call('ZSCORE', job.place, job.id)
    if not is_there or (job.place == LEASES) ~= (job.state == 'in_progress') then
        if job.state == 'in_progress' then record(job, at_us, 'it was held by nobody') end
        move(job, 'queued', ready_place(job), job.order)
        found = 'misplaced'
    end
    found = check_queue(job) or found
    local is_due = job.state == 'queued' and job.deadline_us
    if is_due and not redis.call('ZSCORE', DEADLINES, job.id) then
        redis.call('ZADD', DEADLINES, job.deadline_us, job.id)
        found = 'misplaced'
    end
    if redis.call('PERSIST', job.key) == 1 then found = 'misplaced' end
    return found
end

-- An ended job's record waits; or SQL has it, then its hash has a TTL, and it is not open in SQL.
local function check_ended(job)
    local ended = redis.call('HMGET', job.key, 'record', 'ended_us')
    local waits = ended[1] and #redis.call('XRANGE', LEDGER, ended[1], ended[1]) > 0
    if waits then return 'ended' end
    if redis.call('TTL', job.key) >= 0 and in_sql ~= 'still open' then
        return in_sql == 'open' and 'doubtful' or 'ended'
    end
    redis.call('PERSIST', job.key)
    redis.call('HSET', job.key, 'record', record(job, tonumber(ended[2])))
    return 'unrecorded'
end

local found = {}
for i = 3, #ARGV do
    local job = read_job(ARGV[i])
    local result
    if not job.state then
        result = from ~= '' and redis.call('ZREM', from, job.id) == 1 and 'stray' or 'missing'
    elseif is_open(job) then
        result = check_open(job)
    else
        result = check_ended(job)
        if from ~= '' and redis.call('ZREM', from, job.id) == 1 then result = 'stray' end
    end
    if result == 'misplaced' or result == 'stray' or result == 'unrecorded' then repaired(result) end
    found[#found + 1] = result
end
return found
