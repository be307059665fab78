"""The fault suite: every way in which a part may fail, with real processes and real signals.

`make faults` runs it alone, `make faults REPEAT=20` each test so often, and prints what was killed,
how often, and how long it took until the next token came.
"""
