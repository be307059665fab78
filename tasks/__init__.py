"""The contract between the API and the workers, and the queue between them.

May import `db`; never Flask, never vLLM. Open `message.py` first (what a job is), then `backlog.py`
(its life in Redis), `events.py` (what a worker sends back) and `app.py` (Celery).
"""
