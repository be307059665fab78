"""gunicorn with gevent: the process that `sluice api` becomes, and its settings (gunicorn's names).

Imports next to nothing: gevent's patches come first. Our packages are found where Python has
them; gunicorn's own command would look in the working directory before that.
"""

import os
import resource
import sys
from typing import Any

from gunicorn.app.base import BaseApplication

from api.connection_limits import MOST_STREAMS, OTHER_FILES

# Of a drain, for streams that can be resumed: they get the last id, and end.
ENDING_S = 3.5


class Application(BaseApplication):  # type: ignore[misc]
    """Serves the API on HOST:PORT with that many processes, which drain for that many seconds."""

    def __init__(self, bind: str, processes: str, drain_s: str) -> None:
        self._bind = bind
        self._own = {
            # All of them accept from this one socket: the next connection is for who is free.
            # With a socket each (SO_REUSEPORT) the kernel would deal connections out to the busy
            # as well, and reset those that wait in the queue of a process that ends.
            "bind": bind,
            "workers": int(processes),
            # Streams are cut at the end of it; clients resume them elsewhere.
            "graceful_timeout": int(drain_s),
        }
        super().__init__()

    def load_config(self) -> None:
        """Called at the start and for each SIGHUP (gunicorn's name)."""
        for name, value in (_settings() | self._own).items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """The WSGI application, in a process that gevent has patched (gunicorn's name)."""
        from api.app import create_app

        return create_app(self._bind)


def _settings() -> dict[str, Any]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_unbounded = files == resource.RLIM_INFINITY
    return {
        "worker_class": "api.gunicorn_worker.Worker",
        # One per open stream, as far as files may be opened (server.py has raised that).
        "worker_connections": MOST_STREAMS
        if is_unbounded
        else min(MOST_STREAMS, files - OTHER_FILES),
        "keepalive": 75,
        "timeout": 60,
        "accesslog": None,
        "errorlog": "-",
        # Its lines are no JSON.
        "loglevel": "warning" if os.environ.get("SLUICE_LOG_FORMAT") == "json" else "info",
        "control_socket_disable": True,
        "proc_name": "sluice api",
        "post_worker_init": _end_streams_in_time,
    }


def _end_streams_in_time(worker: Any) -> None:
    """Has the streams that can be resumed end as soon as this process is asked to stop."""
    import gevent

    def watch() -> None:
        while worker.alive:
            gevent.sleep(0.2)
        # Not before this process has stopped accepting: clients come back at once.
        gevent.sleep(worker.cfg.graceful_timeout - ENDING_S)
        worker.wsgi.extensions["sluice"].relay.stop()

    gevent.spawn(watch)


if __name__ == "__main__":
    Application(*sys.argv[1:]).run()
