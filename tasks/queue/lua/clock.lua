-- The time of every script: Redis's, never a host's.
local function now_us()
    local time = redis.call('TIME')
    return time[1] * 1000000 + time[2]
end

-- A whole number as text: Lua would write large ones as 1.7e+15.
local function whole(number)
    return string.format('%.0f', number)
end
