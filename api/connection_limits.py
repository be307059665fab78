"""How many connections an API process serves: as many as it may open files for, less others.

Imports nothing: gunicorn_app.py needs it before gevent's patches.
"""

MOST_STREAMS = 10_000
# For Redis, the database and the process's own.
OTHER_FILES = 300
# Connections that are told to go away at once; more wait to be accepted.
REFUSED_AT_ONCE = 64
KEPT_FILES = OTHER_FILES + REFUSED_AT_ONCE
