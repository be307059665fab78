"""The real Redis under the model: a clock that only tests move, commands and replies that get lost.

Time in Redis is the value of a key: the scripts' one function that reads the clock is made to read
that key, and nothing moves while a test does not want it. Keys with a TTL expire by the same clock.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.retry import Retry

from bench.stack import await_that
from deploy import redis_server
from tasks.queue import backlog as queue

CLOCK = "model:now_us"
RUN = "model:run"
LAST_RECORD = "model:last_record_ms"

RESTART_US = 1_000_000

# redis-py gives up on a reply after 5 s and sends the command again: on a machine that stood still
# for so long, time would pass twice. Here a command is sent again only where a test wants it.
_PATIENCE: dict[str, Any] = {"socket_timeout": None, "retry": Retry(NoBackoff(), 0)}

# In front of every script: the clock, and ids of records that follow it as Redis's own would.
_PRELUDE = f"""
local function virtual_time()
    local us = redis.call('GET', '{CLOCK}')
    return {{string.sub(us, 1, -7), string.sub(us, -6)}}
end
local function virtual_info()
    return 'run_id:' .. redis.call('GET', '{RUN}')
end
local function record_id()
    local last_ms = redis.call('GET', '{LAST_RECORD}') or 0
    local ms = math.max(redis.call('GET', '{CLOCK}') / 1000, last_ms)
    redis.call('SET', '{LAST_RECORD}', string.format('%.0f', math.floor(ms)))
    return string.format('%.0f', math.floor(ms)) .. '-*'
end
"""

# Moves all TTLs; returns the keys that are gone by it.
_SHIFT = """
local gone = {}
for _, key in ipairs(redis.call('KEYS', 'sluice:*')) do
    local left_ms = redis.call('PTTL', key)
    if left_ms >= 0 then
        if left_ms <= tonumber(ARGV[1]) then
            redis.call('DEL', key)
            gone[#gone + 1] = key
        else
            redis.call('PEXPIRE', key, string.format('%.0f', left_ms - ARGV[1]))
        end
    end
end
return gone
"""

_COPY = """
for _, key in ipairs(redis.call('KEYS', '*')) do redis.call('COPY', key, key, 'DB', 1) end
"""


def write_scripts(target: Path, patches: dict[str, list[tuple[str, str]]]) -> None:
    """The scripts as they are shipped, with the clock of tests, and with a test's patches.

    Raises:
        AssertionError: a patch fits nowhere any more.
    """
    shutil.copytree(queue.LUA, target)
    by_file = {f"{name}.lua": changes for name, changes in patches.items()}
    for file in target.iterdir():
        text = file.read_text()
        for old, new in by_file.get(file.name, []):
            assert old in text, f"{file.name} has changed: {old!r} is not in it any more"
            text = text.replace(old, new)
        text = text.replace("redis.call('TIME')", "virtual_time()")
        text = text.replace("redis.call('INFO', 'server')", "virtual_info()")
        text = text.replace("'*', 'job_id'", "record_id(), 'job_id'")
        # A slice that matters has to be small here.
        text = re.sub(r"local MOST_PASSED = \d+", "local MOST_PASSED = 2", text)
        file.write_text((_PRELUDE if file.name == "clock.lua" else "") + text)


@dataclass
class Fault:
    """What happens to commands from one on: each of `times` is lost, or its reply is."""

    after: int
    times: int
    has_run: bool

    def strikes(self) -> bool:
        """Whether it hits the command that is sent now."""
        self.after -= 1
        if self.after >= 0 or self.times == 0:
            return False
        self.times -= 1
        return True


class Server:
    """A redis-server process of the tests' own, with all that they do to it."""

    def __init__(self, home: Path) -> None:
        self._socket = home / "redis.sock"
        options = {"port": "0", "unixsocket": str(self._socket), "save": "", "appendonly": "no"}
        command = [str(redis_server.find_server()), "--dir", str(home)]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.raw = redis.Redis(unix_socket_path=str(self._socket), **_PATIENCE)
        await_that(self._answers)
        self._shift = self.raw.register_script(_SHIFT)
        self._copy = self.raw.register_script(_COPY)
        self._moved_us = 0
        self._copied_us = 0

    def _answers(self) -> bool:
        try:
            return bool(self.raw.ping())
        except redis.ConnectionError:
            return False

    def stop(self) -> None:
        self.raw.close()
        self._process.terminate()
        self._process.wait()

    def client(self, watch: Callable[[tuple[Any, ...], Any], None]) -> "Client":
        return Client(self, str(self._socket), watch)

    def start_over(self, now_us: int) -> None:
        """Empties it, for the next example."""
        self.run = 0
        self.now_us = now_us
        self._copied_us = now_us
        self.raw.flushall()
        self._start()

    def _start(self) -> None:
        self.run += 1
        self.raw.mset({CLOCK: self.now_us, RUN: self.run})

    def pass_time(self, us: int) -> list[str]:
        """Moves its clock, back too; returns the keys that have expired by it."""
        self.now_us += us
        self.raw.set(CLOCK, self.now_us)
        return self._shift_ttls(us)

    def _shift_ttls(self, us: int) -> list[str]:
        gone: Any = self._shift(args=[us // 1000])
        return [key.decode() for key in gone]

    def save(self) -> None:
        """What it holds now is what it comes back with."""
        self._copied_us = self.now_us
        pipeline = self.raw.pipeline(transaction=False)
        pipeline.execute_command("SELECT", 1)
        pipeline.flushdb()
        pipeline.execute_command("SELECT", 0)
        pipeline.execute()
        self._copy()

    def lose_all(self) -> None:
        """It comes back empty."""
        self.raw.flushdb()
        self._start()

    def lose_latest(self) -> list[str]:
        """It comes back as it was when saved; returns the keys that have expired meanwhile."""
        self.now_us += RESTART_US
        self.raw.flushdb()
        self.raw.swapdb(0, 1)
        self._start()
        gone = self._shift_ttls(self.now_us - self._copied_us)
        self.save()
        return gone


class Client(redis.Redis):
    """A client that reports each command that ran, and whose commands and replies get lost."""

    def __init__(
        self, server: Server, socket: str, watch: Callable[[tuple[Any, ...], Any], None]
    ) -> None:
        super().__init__(unix_socket_path=socket, single_connection_client=True, **_PATIENCE)
        self.server = server
        self.fault: Fault | None = None
        self.watch = watch

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return self.attempt(lambda: super(Client, self).execute_command(*args, **options), [args])

    def attempt(
        self, send: Callable[[], Any], commands: list[tuple[Any, ...]], is_once: bool = False
    ) -> Any:
        """Sends, and once more when that fails, as the clients of connections.py do."""
        try:
            return self._attempt(send, commands)
        except redis.ConnectionError:
            if is_once:
                raise
            return self._attempt(send, commands)

    def _attempt(self, send: Callable[[], Any], commands: list[tuple[Any, ...]]) -> Any:
        is_struck = self.fault is not None and self.fault.strikes()
        if self.fault and is_struck and not self.fault.has_run:
            raise redis.ConnectionError("the command was lost")
        reply = send()
        for command, its_reply in zip(
            commands, reply if len(commands) > 1 else [reply], strict=True
        ):
            self.watch(command, its_reply)
        if is_struck:
            raise redis.ConnectionError("the reply was lost")
        return reply

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return WatchedPipeline(self, transaction)

    def time(self, **_: Any) -> Any:
        return divmod(self.server.now_us, 1_000_000)

    def info(self, section: Any = None, *_: Any, **__: Any) -> Any:
        return {"run_id": str(self.server.run), "master_replid": str(self.server.run)}


class WatchedPipeline(Pipeline):
    """One whose commands all run, or all get lost."""

    def __init__(self, client: Client, transaction: bool) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, None)
        self._client = client

    def execute(self, raise_on_error: bool = True) -> Any:
        commands = list(self.command_stack)
        if not commands:
            return super().execute(raise_on_error)

        def send() -> Any:
            self.command_stack = list(commands)
            return super(WatchedPipeline, self).execute(raise_on_error)

        sent = [args for args, _ in commands]
        # What was read before cannot be read again here: its caller does.
        is_once = self.watching
        if len(sent) == 1:
            return [self._client.attempt(lambda: send()[0], sent, is_once)]
        return self._client.attempt(send, sent, is_once)


@contextmanager
def running_server(home: Path) -> Iterator[Server]:
    server = Server(home)
    try:
        yield server
    finally:
        server.stop()
