-- In front of state.lua: what a key and its tenant may use (docs/queue.md, Limits). A job that came with a
-- key has two subjects. What it may cost is reserved when it is admitted, in the counters of that minute,
-- day and month, and settled when it has ended: the reservation is deleted with that, so it happens once,
-- whoever does it.
local MINUTE_US, DAY_US = 60e6, 86400e6
local MOST_LOOKED_AT = 10
local KEPT_S = {requests = 120, tokens = 120, day = 2 * 86400, month = 32 * 86400, held = 32 * 86400}
local SOON_US = 1e6
-- So long after its end what a job has used may still become known, as from the worker that was told to
-- stop it.
local LATE_S = 600

local function subjects_of(tenant, key_id)
    if not key_id or key_id == '' then return {} end
    return {'key:' .. key_id, 'tenant:' .. tenant}
end

-- Months since the year 0, of a day since 1970 (Howard Hinnant, "chrono-Compatible Low-Level Date
-- Algorithms", civil_from_days).
local function month_of(day)
    local shifted = day + 719468
    local era = math.floor(shifted / 146097)
    local of_era = shifted - era * 146097
    local year = math.floor((of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524)
        - math.floor(of_era / 146096)) / 365)
    local of_year = of_era - (365 * year + math.floor(year / 4) - math.floor(year / 100))
    -- From March on.
    return (year + era * 400) * 12 + math.floor((5 * of_year + 2) / 153) + 2
end

local function us_to_next_month(at_us)
    local day = math.floor(at_us / DAY_US)
    local next_day = day + 1
    while month_of(next_day) == month_of(day) do next_day = next_day + 1 end
    return next_day * DAY_US - at_us
end

-- The counters that a moment falls into, by what they count.
local function counters(subject, at_us)
    local minute, day = math.floor(at_us / MINUTE_US), math.floor(at_us / DAY_US)
    local key = USED .. subject
    return {
        requests = key .. ':requests:' .. whole(minute),
        tokens = key .. ':tokens:' .. whole(minute),
        day = key .. ':day:' .. whole(day),
        month = key .. ':month:' .. whole(month_of(day)),
        held = key .. ':held',
    }
end

local function get_number(key) return tonumber(redis.call('GET', key) or 0) end

-- For how many us a value does not fit a limit per minute, if nobody adds anything; nil: for ever. The
-- window slides: the minute before counts by the part of it that is less than a minute ago.
local function wait_for_window(most, cost, used, before, at_us)
    if cost > most then return nil end
    local passed = at_us % MINUTE_US / MINUTE_US
    if used + before * (1 - passed) + cost <= most then return 0 end
    if used + cost <= most then return (1 - (most - cost - used) / before - passed) * MINUTE_US end
    return (1 - passed + math.max(1 - (most - cost) / used, 0)) * MINUTE_US
end

-- Frees places whose jobs hold none any more, of some that are looked at; returns how many.
local function drop_stale(places)
    local dropped = 0
    for _, id in ipairs(redis.call('SRANDMEMBER', places, MOST_LOOKED_AT)) do
        if redis.call('EXISTS', RESERVED .. id) == 0 then dropped = dropped + redis.call('SREM', places, id) end
    end
    return dropped
end

-- What each limit of a subject says to a job: most, what is left, what the job takes of it, and for how
-- many us it refuses the job (nil: for ever). Those per minute also: of what kind, and when it is full
-- again. `asked`: the job's lane; cost, what it is expected to use; budget, the most that it may; is_open:
-- that is a guess, by which no job is refused for ever.
local function check(limits, subject, asked, at_us)
    local now, before = counters(subject, at_us), counters(subject, at_us - MINUTE_US)
    local passed = at_us % MINUTE_US / MINUTE_US
    local found = {}
    local function add(name, left, takes, wait_us)
        found[#found + 1] = {name = name, most = limits[name], left = left, takes = takes, wait_us = wait_us}
        return found[#found]
    end
    for name, kind in pairs({requests_per_minute = 'requests', tokens_per_minute = 'tokens'}) do
        local most = limits[name]
        if most then
            local used, earlier = get_number(now[kind]), get_number(before[kind])
            local takes = kind == 'requests' and 1 or asked.cost
            if asked.is_open then takes = math.min(takes, most) end
            local wait_us = wait_for_window(most, takes, used, earlier, at_us)
            local limit = add(name, most - used - earlier * (1 - passed), takes, wait_us)
            limit.kind, limit.resets_us = kind, (2 - passed) * MINUTE_US
        end
    end
    for name, period in pairs({tokens_per_day = 'day', tokens_per_month = 'month'}) do
        local most = limits[name]
        if most then
            local left = most - get_number(now[period])
            local takes = asked.is_open and math.min(asked.budget, most) or asked.budget
            local wait_us = 0
            if takes > left then wait_us = period == 'day' and DAY_US - at_us % DAY_US or us_to_next_month(at_us) end
            -- What is only reserved may be there again in a moment.
            if takes > left and takes <= left + get_number(now.held) then wait_us = SOON_US end
            if takes > most then wait_us = nil end
            add(name, left, takes, wait_us)
        end
    end
    for name, place in pairs({parallel_requests = OPEN, queued_jobs = WAITING}) do
        local most = limits[name]
        -- Batch jobs are not bounded in how many run.
        if most and (place == WAITING or asked.lane == 'interactive') then
            local left = most - redis.call('SCARD', place .. subject)
            if left <= 0 then left = left + drop_stale(place .. subject) end
            -- Nobody knows when one ends.
            add(name, left, 1, left > 0 and 0 or SOON_US)
        end
    end
    return found
end

-- Notes that a job waits, or does not.
local function note_waiting(job, waits)
    for _, subject in ipairs(subjects_of(job.tenant, job.key_id)) do
        redis.call(waits and 'SADD' or 'SREM', WAITING .. subject, job.id)
    end
end

-- Counts a job, and holds its places.
local function reserve(id, job, cost, budget, at_us)
    local subjects = subjects_of(job.tenant, job.key_id)
    for _, subject in ipairs(subjects) do
        if job.lane == 'interactive' then redis.call('SADD', OPEN .. subject, id) end
        redis.call('SADD', WAITING .. subject, id)
    end
    if #subjects == 0 or redis.call('EXISTS', RESERVED .. id) == 1 then return end
    for _, subject in ipairs(subjects) do
        for what, key in pairs(counters(subject, at_us)) do
            local takes = what == 'requests' and 1 or what == 'tokens' and cost or budget
            redis.call('INCRBY', key, whole(takes))
            redis.call('EXPIRE', key, KEPT_S[what])
        end
    end
    local reserved = table.concat({job.tenant, job.key_id, whole(cost), whole(budget), whole(at_us)}, ' ')
    redis.call('SET', RESERVED .. id, reserved, 'EX', KEPT_S.month)
end

-- Frees the places of a job that has ended.
local function free_places(id, tenant, key_id)
    for _, subject in ipairs(subjects_of(tenant, key_id)) do
        redis.call('SREM', OPEN .. subject, id)
        redis.call('SREM', WAITING .. subject, id)
    end
end

-- Has the counters tell what the job has cost instead of what was reserved for it. nil: that is not known,
-- or not yet, and what was reserved stays.
local function settle_cost(id, cost, at_us)
    local reserved = redis.call('GETDEL', RESERVED .. id)
    if not reserved then return end
    local tenant, key_id, tokens, budget, admitted_us, is_held =
        string.match(reserved, '^(%S+) (%S+) (%d+) (%d+) (%d+)(.*)$')
    free_places(id, tenant, key_id)
    for _, subject in ipairs(subjects_of(tenant, key_id)) do
        local then_keys, now_keys = counters(subject, tonumber(admitted_us)), counters(subject, at_us)
        if is_held == '' then redis.call('DECRBY', now_keys.held, budget) end
        for what, over in pairs(cost and {tokens = cost - tokens, day = cost - budget, month = cost - budget} or {}) do
            -- What it used beyond the estimate, it used by now.
            local key = over > 0 and what == 'tokens' and now_keys.tokens or then_keys[what]
            if key == now_keys.tokens or redis.call('EXISTS', key) == 1 then
                redis.call('INCRBY', key, whole(over))
                redis.call('EXPIRE', key, KEPT_S[what], 'NX')
            end
        end
    end
    if cost then return end
    redis.call('SET', RESERVED .. id, is_held == '' and reserved .. ' late' or reserved, 'EX', LATE_S)
end
