"""vLLM out of the queue: takes tickets, claims jobs, runs them on the engine, sends tokens back.

May import `tasks`; never `db`, never `api`: a GPU machine needs Redis only. Open `main.py` first
(the parts of a worker), then `runner.py` (one job on the engine) and `publisher.py` (tokens out).
"""
