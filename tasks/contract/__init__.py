"""What the API and the workers share: the job, its events, keys, errors, settings, logging.

Imports nothing of ours. Open `job.py` first, then `events.py` and `keys.py`.
"""
