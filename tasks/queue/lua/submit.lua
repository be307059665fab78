-- Queues a job at the end of its priority in its lane; or, before it is accepted in SQL, asks whether
-- that may be done, and holds its idempotency key meanwhile.
-- KEYS: 1 idempotency key (string), used when ARGV 9 is not ''
-- ARGV: 1 step: 'submit' (ask and queue), 'reserve' (ask and hold the key), 'queue' (it is accepted),
--       2 job id, 3 model, 4 lane, 5 bytes of its body, 6 most jobs in the lane, 7 most bytes of the
--       model's bodies, 8 most records of ended jobs, 9 fingerprint ('': no key), 10 time that the key
--       is held in s, 11 priority, 12 deadline in us from now ('': none), 13 attempts before,
--       14 most failures, 15 ticket, 16 limits (JSON, contract/access.py), 17... fields of the hash
-- Returns {id}; {id, '', what is left of limits (JSON)}; {id of the job that has the key, its fingerprint};
-- {'', what is full}; {'', 'limit', which one (JSON)}.
local step, id, model, lane, body_bytes = unpack(ARGV, 1, 5)
local fingerprint = ARGV[9]
local fields = {model = model, body_bytes = body_bytes}
for i = 17, #ARGV, 2 do fields[ARGV[i]] = ARGV[i + 1] end

local function holder()
    local held = fingerprint ~= '' and redis.call('GET', KEYS[1])
    if not held then return nil end
    local known, other = string.match(held, '^(%S+) (%S+)$')
    if other ~= id then return {other, known} end
end

local function what_is_full()
    local place = model .. ':' .. lane
    local queued = redis.call('ZCARD', BACKLOG .. place) + redis.call('ZCARD', SUSPECTS .. place)
    if queued >= tonumber(ARGV[6]) then return 'lane' end
    local held_bytes = tonumber(redis.call('HGET', BODY_BYTES, model) or 0)
    if held_bytes + body_bytes > tonumber(ARGV[7]) then return 'bytes' end
    if redis.call('XLEN', LEDGER) >= tonumber(ARGV[8]) then return 'records' end
end

local at_us = now_us()
local is_open_ended = tonumber(fields.max_tokens) == nil
local answer = tonumber(fields.max_tokens) or mean_answer(model)
local cost = cost_of(fields, answer)
-- Of budgets it takes the most that it may use: no token has less than a byte.
local budget = body_bytes + answer * (fields.sequences or 1)

-- Whether a limit refuses the job: that which does for the longest time. Else what it leaves of the
-- strictest limit on requests, and on tokens.
local function check_limits()
    local refusal, left = nil, {}
    for _, limits in ipairs(cjson.decode(ARGV[16])) do
        for _, found in ipairs(check(limits, limits.subject, {lane = lane, cost = cost, budget = budget, is_open = is_open_ended}, at_us)) do
            local wait_us = found.wait_us or math.huge
            if wait_us > (refusal and refusal.wait_us or 0) then
                refusal = {subject = limits.subject, name = found.name, most = found.most, wait_us = wait_us}
            end
            local rest = found.left - found.takes
            if found.kind and (not left[found.kind] or rest < left[found.kind][2]) then
                left[found.kind] = {found.most, rest, found.resets_us}
            end
        end
    end
    if refusal and refusal.wait_us == math.huge then refusal.wait_us = -1 end
    return refusal, left
end

local function queue()
    -- Order of service: priority first, then time, in ms so that a double holds both exactly.
    local order = string.format('%.3f', ARGV[11] * 1e13 + math.floor(at_us / 1000))
    redis.call('HSET', JOB .. id, 'attempt', ARGV[13], 'order', order, 'max_failures', ARGV[14],
        'queued_us', whole(at_us), 'body_bytes', body_bytes, unpack(ARGV, 17))
    local job = read_job(id)
    move(job, 'queued', ready_place(job), order)
    if ARGV[12] ~= '' then
        local deadline_us = whole(at_us + ARGV[12])
        redis.call('HSET', job.key, 'deadline_us', deadline_us)
        redis.call('ZADD', DEADLINES, deadline_us, id)
    end
    redis.call('HINCRBY', BODY_BYTES, model, body_bytes)
    redis.call('SADD', MODELS, model)
    if lane == 'interactive' then note_arrival(model, at_us) end
    if redis.call('EXISTS', RUN) == 0 then started_us(at_us) end
    count('jobs', 'queued', job)
    wake(model, ARGV[15])
end

-- Sent again after a lost reply: the job may be running already.
if redis.call('EXISTS', JOB .. id) == 1 then return {id} end
local other = holder()
if step ~= 'queue' then
    if other then
        -- Another client waits for that job now: the first one may leave without ending it.
        if redis.call('EXISTS', JOB .. other[1]) == 1 and other[2] == fingerprint then
            redis.call('HSET', JOB .. other[1], 'attached', '1')
        end
        return other
    end
    local full = what_is_full()
    if full then return {'', full} end
end
local left
-- Sent again after a lost reply, it has its reservation.
if step ~= 'queue' and redis.call('EXISTS', RESERVED .. id) == 0 then
    local refusal
    refusal, left = check_limits()
    if refusal then return {'', 'limit', cjson.encode(refusal)} end
end
reserve(id, fields, cost, budget, at_us)
if step ~= 'reserve' then
    redis.call('ZREM', HELD, id)
    queue()
elseif fields.key_id ~= '' then
    redis.call('ZADD', HELD, whole(at_us + ARGV[10] * 1e6), id)
end
-- An accepted job is queued even if another has its key by now; it only does not take the key away.
if fingerprint ~= '' and not other then
    redis.call('SET', KEYS[1], fingerprint .. ' ' .. id, 'EX', ARGV[10])
end
return left and next(left) and {id, '', cjson.encode(left)} or {id}
