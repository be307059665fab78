-- Hands a job back that the caller still holds: it could not finish it.
-- ARGV: 1 id, 2 attempt, 3 reason, 4 cause (contract/job.py), 5 delay in us, 6 ticket
-- Returns 'queued' or 'failed', the same when it is sent again after a lost reply; nil when the attempt is
-- not the current one or the job has ended otherwise.
local job = read_job(ARGV[1])
if job.attempt ~= ARGV[2] then return nil end
if job.state == 'queued' or job.is_dead then return job.state end
if job.state ~= 'in_progress' then return nil end
local delay_us = tonumber(ARGV[5])
requeue(job, now_us(), ARGV[4], ARGV[3], delay_us)
if job.state == 'queued' and delay_us == 0 then wake(job.model, ARGV[6]) end
return job.state
