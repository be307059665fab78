-- Appends entries to token logs and publishes them to the relays that listen: one engine tick.
-- A log has no gaps: an entry follows the last one of its attempt, or begins a later attempt.
-- KEYS: a log (stream) per entry, in order
-- ARGV: 1 TTL of a log in s, since its latest entry, while it has no end; then of each entry:
--       id, value, record ('': none), '1' if it is the log's last entry else '0',
--       channel of its listener ('': none), head of the entry in the channel's frame
-- Returns, for each entry that was refused, its place (from 1) and why: 'stale', a later attempt has
-- written; or the last id in the log ('': there is no log), behind which entries are missing.
-- An entry that is there already is neither written again nor refused. Nothing but what is written is
-- published: nobody may see what a job's next attempt does not know. An error of Redis ends the run;
-- what was written before it is published now, as it will not be when the batch is tried again.
local END = 2 -- events.py has the kinds of entries
local refused, frames, channels = {}, {}, {}
local failure

-- Takes back the entry that the log has just been given with another id than its own. Returns the id
-- of the last one if that leaves a gap before `id`, nil if `id` is there.
local function take_back(log, given, id)
    redis.call('XDEL', log, given)
    local last = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1][1]
    redis.call('XSETID', log, last)
    local function seq(of) return tonumber(string.match(of, '%d+$')) end
    if seq(given) < seq(id) then return last end
end

local function append(log, id, is_first, value, record)
    -- Redis numbers the entry: as the next of its attempt, or 0 for a new one. If that is what it
    -- should be, nothing is missing; to read the last entry first would take 1.7 times as long.
    local number = string.match(id, '%d+-') .. '*'
    local command = is_first and {'XADD', log, number, 'e', value}
        or {'XADD', log, 'NOMKSTREAM', number, 'e', value}
    if record ~= '' then
        command[#command + 1] = 'r'
        command[#command + 1] = record
    end
    return redis.pcall(unpack(command))
end

-- Whether an attempt before the one that has just ended the log had ended it. SQL may have that end
-- already, and the log a TTL.
local function had_end(log)
    local before = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 2)[2]
    return before and string.byte(before[2][2]) == END
end

local function publish(channel, head, value)
    local frame = frames[channel]
    if not frame then
        frame = {}
        frames[channel] = frame
        channels[#channels + 1] = channel
    end
    frame[#frame + 1] = head
    frame[#frame + 1] = value
end

for i, log in ipairs(KEYS) do
    local id, value, record, is_last, channel, head = unpack(ARGV, 6 * i - 4, 6 * i + 1)
    local is_first = string.sub(id, -2) == '-0'
    local given = append(log, id, is_first, value, record)
    local reason
    if given == id then
        if is_last == '1' then
            if not (is_first and had_end(log)) then redis.call('PERSIST', log) end
        else
            redis.call('EXPIRE', log, ARGV[1])
        end
        if channel ~= '' then publish(channel, head, value) end
    elseif not given then
        reason = ''
    elseif given.err then
        -- Only a refused id is an answer; anything else (out of memory...) is the caller's error.
        if not string.find(given.err, 'equal or smaller') then
            failure = given
            break
        end
        reason = 'stale'
    else
        reason = take_back(log, given, id)
    end
    if reason then
        refused[#refused + 1] = i
        refused[#refused + 1] = reason
    end
end
for _, channel in ipairs(channels) do
    redis.call('PUBLISH', channel, table.concat(frames[channel]))
end
return failure or refused
