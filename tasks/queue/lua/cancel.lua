-- Cancels a job in whatever state it is.
-- ARGV: 1 id, 2 '1': only if no other client has attached to it
-- Returns {tenant, attempt, worker or '', listener}, the same when it has been cancelled before (the
-- caller may have crashed before it notified anybody); nil when it has ended otherwise, is unknown or kept.
local job = read_job(ARGV[1])
if not is_open(job) and job.state ~= 'cancelled' then return nil end
if is_open(job) then
    if ARGV[2] == '1' and job.attached then return nil end
    end_job(job, 'cancelled', now_us())
end
return {job.tenant, job.attempt, job.worker or '', job.listener or ''}
