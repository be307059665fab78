-- Notes that a suspect has produced what no earlier attempt did: it is not what kills its workers at
-- once, and the next suspect may start beside it. Once per job, for it takes a failure back.
-- KEYS: 1 the worker's suspect (string)
-- ARGV: 1 id, 2 attempt, 3 ticket
local job = read_job(ARGV[1])
if job.state ~= 'in_progress' or job.attempt ~= ARGV[2] or job.cleared then return end
redis.call('HSET', job.key, 'cleared', '1', 'failures', job.failures - 1)
if redis.call('GET', KEYS[1]) == job.id .. ' ' .. job.attempt then redis.call('DEL', KEYS[1]) end
wake(job.model, ARGV[3])
