"""HTTP in, tokens out: the Flask app, run by gunicorn with gevent.

May import `tasks` and `db`; never `gpu_worker`. Open `app.py` first, then `routes/`,
`generation.py` (one request), `relay.py` (from Redis to its stream) and `errors.py`.
"""
