-- What a job has used that was stopped on its way, as its worker knows once it has stopped.
-- ARGV: 1 id, 2 tokens
if not is_open(read_job(ARGV[1])) then settle_cost(ARGV[1], tonumber(ARGV[2]), now_us()) end
