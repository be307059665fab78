-- Chat completions for wrk: whole answers, as fast as they come. Exit code 1 when any failed.
--
--   wrk -t2 -c64 -d30s --timeout 60s -s bench/load/post.lua http://127.0.0.1:8000 -- 16 MODEL
--
-- After `--`: the tokens of each answer (16) and the model (the server's own). A key is read from
-- SLUICE_API_KEY.

local function quoted(text)
  return '"' .. text:gsub('[\\"]', "\\%0") .. '"'
end

function init(args)
  local max_tokens, model = tonumber(args[1] or 16), args[2]
  if not max_tokens then
    io.stderr:write("post.lua: after `--` comes a number of tokens, not " .. args[1] .. "\n")
    os.exit(2)
  end
  local key = os.getenv("SLUICE_API_KEY")
  wrk.method = "POST"
  wrk.path = (wrk.path == "/" and "" or wrk.path) .. "/v1/chat/completions"
  wrk.headers["Content-Type"] = "application/json"
  if key then
    wrk.headers["Authorization"] = "Bearer " .. key
  end
  wrk.body = string.format(
    '{%s"messages": [{"role": "user", "content": "What is a ticket?"}], "max_tokens": %d}',
    model and '"model": ' .. quoted(model) .. ", " or "",
    max_tokens
  )
end

-- wrk's own words for what went wrong are easily missed, and its exit code is 0.
function done(summary, latency, requests)
  local errors, failed = summary.errors, 0
  for _, kind in ipairs({ "connect", "read", "write", "status", "timeout" }) do
    failed = failed + errors[kind]
  end
  local answered = summary.requests - errors.status
  print(string.format(
    "answers/s %.1f, p50 %.1f ms, p99 %.1f ms, failed %d",
    answered / summary.duration * 1e6,
    latency:percentile(50) / 1000,
    latency:percentile(99) / 1000,
    failed
  ))
  if failed > 0 or answered == 0 then
    os.exit(1)
  end
end
