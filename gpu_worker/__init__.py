"""vLLM out of the queue: takes tickets, claims jobs, runs them on the engine, sends tokens back.

May import `tasks.contract` and `tasks.queue`; never `db`, never `api`: a GPU machine needs Redis
only. Open `worker.py` first, then `runner.py` (one job on the engine), `publisher.py` (tokens out),
`heartbeat.py`, `shutdown.py` and `engines/`; `front_ends.py` has several workers on one engine.
"""
