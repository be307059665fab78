-- Sends tickets.
-- ARGV: 1 model, 2... tickets
for i = 2, #ARGV do wake(ARGV[1], ARGV[i]) end
