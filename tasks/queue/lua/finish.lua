-- Ends a job that the caller still holds.
-- ARGV: 1 id, 2 attempt, 3 final state, 4 why it is a dead letter ('': it is none), 5 lanes as
--       'interactive batch', 6 tokens of its prompt, 7 of its answer ('': not known)
-- Returns 1, also when this attempt has ended it before (a reply was lost); 2 if other jobs of the model
-- wait; 0 when the attempt is not the current one or the job has ended otherwise: the caller's result is
-- then void.
local job = read_job(ARGV[1])
if job.attempt ~= ARGV[2] then return 0 end
local function ended()
    local places = {}
    for lane in string.gmatch(ARGV[5], '%S+') do
        places[#places + 1] = BACKLOG .. job.model .. ':' .. lane
        places[#places + 1] = SUSPECTS .. job.model .. ':' .. lane
    end
    return redis.call('EXISTS', unpack(places)) > 0 and 2 or 1
end

if job.state ~= 'in_progress' then return job.state == ARGV[3] and ended() or 0 end
local at_us = now_us()
local input, output = tonumber(ARGV[6]), tonumber(ARGV[7])
end_job(job, ARGV[3], at_us, ARGV[4], ARGV[4] ~= '', input and input + output)

-- The model's mean, with one more value.
local function mean(old, value)
    old = tonumber(old) or value
    return old + (value - old) * 0.05
end

if ARGV[3] == 'completed' then
    local took_us, key = at_us - job.started_us, SERVICE .. job.model
    redis.call('SET', key, whole(mean(redis.call('GET', key), took_us)))
    if input then
        local tokens = TOKENS .. job.model
        local known = redis.call('HMGET', tokens, 'input', 'output')
        redis.call('HSET', tokens, 'input', exact(mean(known[1], input)),
            'output', exact(mean(known[2], output / (job.sequences or 1))))
    end
end
return ended()
