-- Ends a job that the caller still holds.
-- KEYS: 1 mean service time of its model (string)
-- ARGV: 1 id, 2 attempt, 3 final state, 4 why it is a dead letter ('': it is none), 5 lanes as
--       'interactive batch'
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
end_job(job, ARGV[3], at_us, ARGV[4], ARGV[4] ~= '')
if ARGV[3] == 'completed' then
    local took_us = at_us - job.started_us
    local mean_us = tonumber(redis.call('GET', KEYS[1])) or took_us
    redis.call('SET', KEYS[1], whole(mean_us + (took_us - mean_us) * 0.05))
end
return ended()
