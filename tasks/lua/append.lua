-- Appends entries to token logs and publishes them to the relays that listen: one engine tick.
-- KEYS: a log (stream) per entry, in order
-- ARGV: 1 TTL of a log in s, 2 retention in s, 3 number of entries n,
--       then n times: entry id, value, '1' if it is the log's last entry else '0',
--       then pairs of channel and frame
-- Returns the positions (from 1) of entries refused: a later attempt has written, or the log is gone.
local n = tonumber(ARGV[3])
local refused = {}
for i = 1, n do
    local at = 1 + 3 * i
    local id = ARGV[at]
    -- Only a job's first entry makes a log: one that Redis has lost is not begun in the middle.
    local is_first = string.sub(id, -2) == '-0'
    local reply = is_first and redis.pcall('XADD', KEYS[i], id, 'e', ARGV[at + 1])
        or redis.pcall('XADD', KEYS[i], 'NOMKSTREAM', id, 'e', ARGV[at + 1])
    if not reply then
        refused[#refused + 1] = i
    elseif reply.err then
        -- Only a refused id is an answer; anything else (out of memory...) is the caller's error.
        if not string.find(reply.err, 'equal or smaller') then return reply end
        refused[#refused + 1] = i
    elseif ARGV[at + 2] == '1' then
        redis.call('EXPIRE', KEYS[i], ARGV[2])
    elseif is_first then
        redis.call('EXPIRE', KEYS[i], ARGV[1])
    end
end
for i = 4 + 3 * n, #ARGV, 2 do redis.call('PUBLISH', ARGV[i], ARGV[i + 1]) end
return refused
