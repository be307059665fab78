-- Appends entries to token logs and publishes them to the relays that listen: one engine tick.
-- KEYS: a log (stream) per entry, in order
-- ARGV: 1 TTL of a log in s, 2 retention in s, then of each entry:
--       id, value, record ('': none), '1' if it is the log's last entry else '0',
--       channel of its listener ('': none), head of the entry in the channel's frame
-- Returns the positions (from 1) of entries refused: a later attempt has written, or the log is gone.
-- What is refused is not published either: nobody may see what a job's next attempt does not know.
local refused, frames, channels = {}, {}, {}
for i, log in ipairs(KEYS) do
    local id, value, record, is_last, channel, head = unpack(ARGV, 6 * i - 3, 6 * i + 2)
    -- Only the first entry of an attempt makes a log: one that Redis has lost is not begun in the middle.
    local is_first = string.sub(id, -2) == '-0'
    local command = {'XADD', log, id, 'e', value}
    if not is_first then table.insert(command, 3, 'NOMKSTREAM') end
    if record ~= '' then
        command[#command + 1] = 'r'
        command[#command + 1] = record
    end
    local reply = redis.pcall(unpack(command))
    if not reply then
        refused[#refused + 1] = i
    elseif reply.err then
        -- Only a refused id is an answer; anything else (out of memory...) is the caller's error.
        if not string.find(reply.err, 'equal or smaller') then return reply end
        refused[#refused + 1] = i
    else
        if is_last == '1' then
            redis.call('EXPIRE', log, ARGV[2])
        elseif is_first then
            redis.call('EXPIRE', log, ARGV[1])
        end
        if channel ~= '' then
            local frame = frames[channel]
            if not frame then
                frame = {}
                frames[channel] = frame
                channels[#channels + 1] = channel
            end
            frame[#frame + 1] = head
            frame[#frame + 1] = value
        end
    end
end
for _, channel in ipairs(channels) do
    redis.call('PUBLISH', channel, table.concat(frames[channel]))
end
return refused
