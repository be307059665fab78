-- Sends a ticket, if none waits.
-- ARGV: 1 model, 2 ticket
wake(ARGV[1], ARGV[2])
