"""The queue in Redis: backlog, leases, token logs, tickets, and statistics.

Imports `tasks.contract` only: a GPU machine needs Redis, not SQL. Open `backlog.py` with `lua/`
first, then `token_log.py`, `statistics.py` and `celery_app.py`. Only workers import
`celery_worker.py`.
"""
