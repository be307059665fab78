-- Hands on the jobs whose lease has expired: back to their places in the backlog, or, after their
-- last failure, to their end. Ends the jobs that have not started by their deadline. And puts those
-- back in the backlog whose delay is over. Gives up the reservations of jobs that were not accepted.
-- ARGV: 1 at most, of each kind
-- Returns a list of {id, model, tenant, attempt, listener, 'queued', 'failed' or 'expired', endpoint, when
-- the attempt started in us ('': none has ended here), traceparent, since when it waited for that in us ('':
-- its wait goes on)}.
local at_us = now_us()
local reaped = {}

local function each_due(zset, reap)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', zset, '-inf', whole(at_us), 'LIMIT', 0, ARGV[1])) do
        local job = read_job(id)
        local waited_since_us = zset ~= DELAYED and (job.requeued_us or job.queued_us) or ''
        if reap(job) then
            reaped[#reaped + 1] = {id, job.model, job.tenant, job.attempt, job.listener or '', job.state,
                job.endpoint or '', zset == LEASES and job.started_us or '', job.traceparent or '',
                waited_since_us}
        else
            redis.call('ZREM', zset, id)
        end
    end
end

each_due(LEASES, function(job)
    if job.place ~= LEASES then return false end
    requeue(job, at_us, 'lease_expired', 'worker ' .. (job.worker or '') .. ' fell silent', 0)
    return true
end)
each_due(DEADLINES, function(job)
    if job.state ~= 'queued' or not job.deadline_us then return false end
    end_job(job, 'expired', at_us)
    return true
end)
-- A reservation that was not used. That of a job that was queued meanwhile stays.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', HELD, '-inf', whole(at_us), 'LIMIT', 0, ARGV[1])) do
    redis.call('ZREM', HELD, id)
    if redis.call('EXISTS', JOB .. id) == 0 then settle_cost(id, 0, at_us) end
end
each_due(DELAYED, function(job)
    if job.place ~= DELAYED then return false end
    move(job, 'queued', ready_place(job), job.order)
    return true
end)
return reaped
