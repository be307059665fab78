-- Lets ended jobs go that SQL has: only now may they expire.
-- ARGV: 1 retention in s, then ids, each with its job's tokens ('': not known)
-- Returns for each: 1 if it has ended (or is gone), 0 if it runs again, as after a loss of Redis.
local settled = {}
for i = 2, #ARGV, 2 do
    local job = read_job(ARGV[i])
    settled[#settled + 1] = is_open(job) and 0 or 1
    if not is_open(job) then settle_cost(job.id, tonumber(ARGV[i + 1]), now_us()) end
    if job.state and not is_open(job) then
        redis.call('HDEL', job.key, 'body')
        redis.call('EXPIRE', job.key, ARGV[1])
    end
end
return settled
