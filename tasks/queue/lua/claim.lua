-- Takes a job of the first lane that has one, and leases it to a worker: the first job of the tenant
-- that has had the least service there (fair.lua). A worker runs one uncleared suspect at a time, so that
-- none fails because of another (clear.lua); a suspect has had its turn, so it goes before all others.
-- KEYS: 1 claim of this token (string), 2 the worker's suspect (string)
-- ARGV: 1 worker, 2 lease in us, 3 model, 4 the worker's free slots, 5 ticket, 6 lanes as
--       'interactive batch', 7 slots that batch jobs leave free for interactive ones that may come,
--       8... fields of the hash to return
-- Returns nil when nothing is to be done, else {id, attempt, ms since it was accepted, ms since it was
-- queued last, fields...}.

-- Each is put aside once; what is left waits for the next claim.
local MOST_PASSED = 100
local at_us = now_us()
local model = ARGV[3]

local function reply(job)
    local values = redis.call('HMGET', job.key, unpack(ARGV, 8))
    local function ms_since(us) return whole(math.floor((job.started_us - us) / 1000)) end
    return {job.id, job.attempt, ms_since(job.queued_us), ms_since(job.requeued_us or job.queued_us), unpack(values)}
end

-- The claim of a key, if it still holds.
local function held_claim(key)
    local held = redis.call('GET', key)
    if not held then return nil end
    local id, attempt = string.match(held, '^(%S+) (%S+)$')
    local job = read_job(id)
    if job.state == 'in_progress' and job.attempt == attempt then return job end
end

local function first(zset) return redis.call('ZRANGE', zset, 0, 0)[1] end

local may_have_suspect = not held_claim(KEYS[2])

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
local function next_attempt(job)
    if tonumber(job.queued_us) > started_us(at_us) then return job.attempt + 1 end
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
    redis.call('SET', KEYS[1], held, 'PX', whole(ARGV[2] / 500))
    if is_suspect then redis.call('SET', KEYS[2], held, 'EX', 86400) end
end

-- Wakes one more slot when more jobs wait and no ticket does.
local function wake_next()
    if redis.call('LLEN', TICKETS .. model) > 0 then return end
    for lane in string.gmatch(ARGV[6], '%S+') do
        if first(BACKLOG .. model .. ':' .. lane) then return wake(model, ARGV[5]) end
    end
end

-- The slots that jobs of a lane may take.
local function room(lane)
    local is_batch = lane == model .. ':batch'
    return ARGV[4] - (is_batch and math.min(ARGV[7], arrivals_soon(model, at_us)) or 0)
end

-- A job that is not where it was found.
local function drop(place, id, lane, tenant)
    redis.call('ZREM', place, id)
    if tenant then leave(lane, tenant, id) end
    redis.call('HINCRBY', COUNTS, 'repairs stray  ', 1)
end

-- Claims the lane's next job; nil and true: it does not fit, and nobody passes it.
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
            return job, true
        end
    end
    return nil, true
end

-- A claim whose reply was lost has happened.
local again = held_claim(KEYS[1])
if again then return reply(again) end
if redis.call('SISMEMBER', PAUSED, model) == 1 then return nil end
for lane in string.gmatch(ARGV[6], '%S+') do
    local job, is_done = take(model .. ':' .. lane)
    if job then wake_next() end
    if is_done then return job and reply(job) end
end
return nil
