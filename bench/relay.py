"""A network on loopback that can stall, or be cut: a relay in front of a server."""

import socket
import socketserver
import threading
from contextlib import suppress

READ_BYTES = 1 << 16


class Relay(socketserver.ThreadingTCPServer):
    """Passes on what comes, in both directions, as long as it is not told otherwise."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int) -> None:
        """`port`: of the server on loopback."""
        super().__init__(("127.0.0.1", 0), _Connection)
        self.server_side: set[socket.socket] = set()
        self.flows = threading.Event()
        self.flows.set()
        self._server = ("127.0.0.1", port)

    @property
    def port(self) -> int:
        """Where clients connect."""
        return int(self.server_address[1])

    def stall(self) -> None:
        """Passes on nothing any more, the ends of connections included."""
        self.flows.clear()

    def cut(self) -> None:
        """The same, and the server sees all connections close; their clients see nothing."""
        self.flows.clear()
        for one in list(self.server_side):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def resume(self) -> None:
        """Passes on what has come meanwhile."""
        self.flows.set()

    def reach_server(self) -> socket.socket:
        """A connection to the server."""
        return socket.create_connection(self._server)


class _Connection(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        self.server.flows.wait()
        with suppress(OSError), self.server.reach_server() as server:
            self.server.server_side.add(server)
            try:
                back = threading.Thread(
                    target=self._pass_on, args=(server, self.request), daemon=True
                )
                back.start()
                self._pass_on(self.request, server)
                back.join()
            finally:
                self.server.server_side.discard(server)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        """Until the source has ended, or the target is gone; then the target has ended, too."""
        with suppress(OSError):
            while data := source.recv(READ_BYTES):
                self.server.flows.wait()
                target.sendall(data)
        self.server.flows.wait()
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
