"""gunicorn's settings (its own names). Imports next to nothing: gevent's patches come first."""

import os
import resource
from typing import Any

worker_class = "api.gunicorn_worker.Worker"
# One per open stream, as far as files may be opened; some are for Redis, SQL and the process's own.
_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
worker_connections = 10_000 if _files == resource.RLIM_INFINITY else min(10_000, _files - 300)
keepalive = 75
# Streams are cut at the end of it; clients resume them elsewhere.
graceful_timeout = 5
timeout = 60
accesslog = None
errorlog = "-"
# Its lines are no JSON.
loglevel = "warning" if os.environ.get("SLUICE_LOG_FORMAT") == "json" else "info"
control_socket_disable = True


def post_worker_init(worker: Any) -> None:
    """Has the streams that can be resumed end as soon as this process is asked to stop."""
    import gevent

    def watch() -> None:
        while worker.alive:
            gevent.sleep(0.2)
        # Not before this process has stopped accepting: clients come back at once.
        gevent.sleep(1.5)
        worker.wsgi.extensions["sluice"].relay.stop()

    gevent.spawn(watch)
