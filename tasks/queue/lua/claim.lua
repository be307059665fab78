-- Leases jobs to a worker, one after the other while it has room. Each is of the first lane that has one:
-- the first job of the tenant that has had the least service there (fair.lua). A worker runs one uncleared
-- suspect at a time, so that none fails because of another (clear.lua); a suspect has had its turn, so it
-- goes before all others.
-- KEYS: 1 claims of this token (string), 2 the worker's suspect (string)
-- ARGV: 1 worker, 2 lease in us, 3 model, 4 the worker's free slots, 5 slots that the first job may take,
--       which are more if the worker is idle, 6 most jobs, 7 ticket, 8 lanes as 'interactive batch', 9 slots
--       that batch jobs leave free for interactive ones that may come, 10... fields of the hash to return
-- Returns for each job {id, attempt, ms since it was accepted, ms since it was queued last, fields...}.

-- Each is put aside once; what is left waits for the next claim.
local MOST_PASSED = 100
-- With so many bytes of requests the reply takes no more jobs.
local MOST_BYTES = 2^20
local at_us = now_us()
local model = ARGV[3]
local free = tonumber(ARGV[4])
local claimed, held_now, bytes = {}, {}, 0

local function reply(jobs)
    local rows = {}
    for i, job in ipairs(jobs) do
        local function ms_since(us) return whole(math.floor((job.started_us - us) / 1000)) end
        rows[i] = {job.id, job.attempt, ms_since(job.queued_us), ms_since(job.requeued_us or job.queued_us),
            unpack(redis.call('HMGET', job.key, unpack(ARGV, 10)))}
    end
    return rows
end

-- The claims of a key that still hold.
local function held_claims(key)
    local held = {}
    for id, attempt in string.gmatch(redis.call('GET', key) or '', '(%S+) (%S+)') do
        local job = read_job(id)
        if job.state == 'in_progress' and job.attempt == attempt then held[#held + 1] = job end
    end
    return held
end

local function first(zset) return redis.call('ZRANGE', zset, 0, 0)[1] end

local may_have_suspect = #held_claims(KEYS[2]) == 0

-- The place and the id of the lane's job that is next for this worker, and its tenant unless it is a
-- suspect. An older version has left jobs in no tenant's queue; the sweeper puts them there.
local function next_of(lane)
    local suspect = may_have_suspect and first(SUSPECTS .. lane)
    if suspect then return SUSPECTS .. lane, suspect end
    local tenant = first(TURNS .. lane)
    if not tenant then return BACKLOG .. lane, first(BACKLOG .. lane), '' end
    return BACKLOG .. lane, first(QUEUE .. lane .. ':' .. tenant) or '', tenant
end

-- A Redis that has come back without its last second may have given out numbers that it does not know:
-- attempts of jobs that are older than its start go on with the ms since then.
local since_us
local function next_attempt(job)
    since_us = since_us or started_us(at_us)
    if tonumber(job.queued_us) > since_us then return job.attempt + 1 end
    return math.max(job.attempt + 100, math.floor((at_us - job.queued_us) / 1000))
end

local function claim(job, is_suspect)
    job.attempt = whole(next_attempt(job))
    job.worker, job.started_us = ARGV[1], whole(at_us)
    drop_deadline(job)
    move(job, 'in_progress', LEASES, whole(at_us + ARGV[2]))
    charge(job)
    redis.call('HSET', job.key, 'attempt', job.attempt, 'worker', job.worker, 'started_us', job.started_us,
        'charged', job.charged)
    record(job, at_us)
    count('jobs', 'in_progress', job)
    local held = job.id .. ' ' .. job.attempt
    claimed[#claimed + 1], held_now[#held_now + 1] = job, held
    -- After each job: if the next one makes the script fail, the same token finds those before it.
    redis.call('SET', KEYS[1], table.concat(held_now, ' '), 'PX', whole(ARGV[2] / 500))
    if is_suspect then
        redis.call('SET', KEYS[2], held, 'EX', 86400)
        may_have_suspect = false
    end
    free = free - (job.sequences or 1)
    bytes = bytes + (job.body_bytes or 0)
end

-- Wakes one more worker when more jobs wait.
local function wake_next()
    for lane in string.gmatch(ARGV[8], '%S+') do
        local place = model .. ':' .. lane
        if redis.call('EXISTS', BACKLOG .. place, SUSPECTS .. place) > 0 then return wake(model, ARGV[7]) end
    end
end

-- The slots that the next job may take, if it is of that lane.
local function room(lane)
    local is_batch = lane == model .. ':batch'
    local slots = #claimed == 0 and ARGV[5] or free
    return slots - (is_batch and math.min(ARGV[9], arrivals_soon(model, at_us)) or 0)
end

-- How many jobs it may take: its share of what waits, as idle workers beside it are to have as much to do.
local function share()
    local waiting = 0
    for lane in string.gmatch(ARGV[8], '%S+') do
        local place = model .. ':' .. lane
        waiting = waiting + redis.call('ZCARD', BACKLOG .. place) + redis.call('ZCARD', SUSPECTS .. place)
    end
    return math.min(ARGV[6], math.ceil(waiting / math.max(redis.call('SCARD', WORKERS), 1)))
end

-- A job that is not where it was found.
local function drop(place, id, lane, tenant)
    redis.call('ZREM', place, id)
    if tenant then leave(lane, tenant, id) end
    redis.call('HINCRBY', COUNTS, 'repairs stray  ', 1)
end

-- Claims the lane's next job, and returns true; nil and true: it does not fit, and nobody passes it.
local function take(lane)
    for _ = 1, MOST_PASSED do
        local place, id, tenant = next_of(lane)
        if not id then return nil, false end
        local job = read_job(id)
        if job.place ~= place then
            drop(place, id, lane, tenant)
        elseif job.deadline_us and tonumber(job.deadline_us) <= at_us then
            -- Too late: aside, where the reaper ends it.
            move(job, 'queued', DELAYED, whole(at_us))
        elseif tonumber(job.sequences or 1) > room(lane) then
            return nil, true
        else
            claim(job, tenant == nil)
            return true, true
        end
    end
    return nil, true
end

-- Claims the next job of the first lane that has one; false: there is none, or it does not fit.
local function take_next()
    for lane in string.gmatch(ARGV[8], '%S+') do
        local has_claimed, is_done = take(model .. ':' .. lane)
        if is_done then return has_claimed end
    end
end

-- Claims whose reply was lost have happened.
local again = held_claims(KEYS[1])
if #again > 0 then return reply(again) end
if redis.call('SISMEMBER', PAUSED, model) == 1 then return {} end
local most = share()
while #claimed < most and bytes < MOST_BYTES and (#claimed == 0 or free > 0) do
    if not take_next() then break end
end
if #claimed > 0 then wake_next() end
return reply(claimed)
