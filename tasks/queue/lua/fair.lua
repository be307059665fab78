-- In front of state.lua: whose turn it is (docs/queue.md, Fairness). A job that waits in its lane waits
-- in its tenant's queue there too, and `turns` has the tenants with such jobs. Each has a counter of its
-- service in the lane: tokens, divided by the weight of the job.
local function lane_of(job) return job.model .. ':' .. job.lane end

-- As text, so that no digit is lost.
local function exact(number) return string.format('%.17g', number) end

-- The least counter of those that wait in the lane; if nobody does, of the last one that did.
local function least(lane)
    local first = redis.call('ZRANGE', TURNS .. lane, 0, 0, 'WITHSCORES')
    return tonumber(first[2] or redis.call('GET', LEVEL .. lane) or 0)
end

-- Puts a job in its tenant's queue. One that had no job there begins no lower than the others: to be
-- idle gives no credit.
local function enter(job, order)
    local lane = lane_of(job)
    redis.call('ZADD', QUEUE .. lane .. ':' .. job.tenant, order, job.id)
    if redis.call('ZSCORE', TURNS .. lane, job.tenant) then return end
    local served = SERVED .. lane .. ':' .. job.tenant
    local own = tonumber(redis.call('GET', served) or 0)
    redis.call('ZADD', TURNS .. lane, exact(math.max(own, least(lane))), job.tenant)
    redis.call('DEL', served)
end

-- Takes a job from its tenant's queue. A tenant whose last one it was keeps its counter for a day.
local function leave(lane, tenant, id)
    local queue, turns = QUEUE .. lane .. ':' .. tenant, TURNS .. lane
    redis.call('ZREM', queue, id)
    if redis.call('EXISTS', queue) == 1 then return end
    local counter = redis.call('ZSCORE', turns, tenant)
    if not counter then return end
    redis.call('ZREM', turns, tenant)
    redis.call('SET', SERVED .. lane .. ':' .. tenant, counter, 'EX', SERVED_S)
    if redis.call('EXISTS', turns) == 0 then redis.call('SET', LEVEL .. lane, counter) end
end

-- Adds to the counter of the job's tenant, if it still has one.
local function add(job, service)
    local lane = lane_of(job)
    if redis.call('ZADD', TURNS .. lane, 'XX', 'INCR', exact(service), job.tenant) then return end
    local served = SERVED .. lane .. ':' .. job.tenant
    local counter = redis.call('GET', served)
    if counter then redis.call('SET', served, exact(counter + service), 'EX', SERVED_S) end
end

-- How many tokens a job costs whose answers have so many each; its prompt by its bytes.
local function cost_of(job, each) return job.body_bytes / BYTES_PER_TOKEN + each * (job.sequences or 1) end

-- How many tokens the model's answers have.
local function mean_answer(model)
    return tonumber(redis.call('HGET', TOKENS .. model, 'output') or MEAN_TOKENS)
end

-- Charges a job that is claimed what it is expected to cost: with an answer as long as the model's mean, or
-- what the job allows. One that was handed back has been charged.
local function charge(job)
    if job.charged then return end
    local each = mean_answer(job.model)
    local tokens = cost_of(job, math.min(each, tonumber(job.max_tokens) or each))
    job.charged = exact(math.min(tokens, MOST_TOKENS) / (job.weight or 1))
    add(job, job.charged)
end

-- Charges a job that ends what it has cost instead: its tokens, if they are known; else, if it runs, as
-- much as its time on the engine is of the model's mean.
local function correct(job, tokens, at_us)
    if not job.charged then return end
    local most, cost = MOST_TOKENS / (job.weight or 1), nil
    if tokens then
        cost = tokens / (job.weight or 1)
    elseif job.state == 'in_progress' then
        local mean_us = tonumber(redis.call('GET', SERVICE .. job.model) or 0)
        local ran_us = math.max(at_us - job.started_us, 0)
        if mean_us > 0 then cost = math.min(job.charged * ran_us / mean_us, most) end
    end
    if not cost then return end
    add(job, cost - job.charged)
    job.charged = exact(cost)
    redis.call('HSET', job.key, 'charged', job.charged)
end
