-- Gives up what is held for a job that is not accepted after all.
-- KEYS: 1 idempotency key (string)
-- ARGV: 1 id, 2 fingerprint ('': no key)
if redis.call('EXISTS', JOB .. ARGV[1]) == 1 then return end
redis.call('ZREM', HELD, ARGV[1])
settle_cost(ARGV[1], 0, now_us())
if redis.call('GET', KEYS[1]) == ARGV[2] .. ' ' .. ARGV[1] then redis.call('DEL', KEYS[1]) end
