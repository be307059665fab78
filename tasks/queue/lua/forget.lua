-- Forgets a job that ended, but whose answer is lost, so that the reconciler queues it again.
-- ARGV: 1 id, 2 attempt that ended it
local job = read_job(ARGV[1])
if job.state and not is_open(job) and job.attempt == ARGV[2] then redis.call('DEL', job.key) end
