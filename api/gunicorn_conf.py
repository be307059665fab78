"""gunicorn's settings (its own names)."""

worker_class = "gevent"
# One per open stream; the operating system's limit of open files comes first.
worker_connections = 10_000
keepalive = 75
# Streams are cut at the end of it; clients resume them elsewhere.
graceful_timeout = 5
timeout = 60
accesslog = None
errorlog = "-"
loglevel = "info"
control_socket_disable = True
