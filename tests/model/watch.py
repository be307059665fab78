"""Passes every command that ran in Redis to the model, and compares the reply with the model's."""

import hashlib
from collections.abc import Callable
from typing import Any

from tasks.contract import keys
from tasks.queue import backlog
from tests.model.expected import Expected
from tests.model.scripts import Scripts

# The part of a script's reply that the model predicts.
_PARTS: dict[str, Callable[[Any], Any]] = {
    "claim": lambda reply: [row[:2] for row in reply],
    "cancel": lambda reply: reply and reply[1:3],
    "reap": lambda reply: [[row[0], row[3], row[5]] for row in reply],
    "depths": lambda reply: reply[::2],
}
_READS = {
    *("HMGET", "HGET", "HGETALL", "GET", "SMEMBERS", "LLEN", "ZSCAN", "SCAN", "XREVRANGE"),
    *("ZRANK", "ZCARD", "EXISTS", "SCRIPT LOAD", "XLEN", "PING", "TYPE"),
}


class Watch:
    """The model, kept in step with the commands of Redis."""

    def __init__(self) -> None:
        self.scripts = Scripts()
        self._names: dict[str, str] = {}
        self.orders: list[tuple[str, str]] = []
        """Messages on control channels that were not received yet: worker and message."""

    @property
    def expected(self) -> Expected:
        return self.scripts.expected

    def learn_scripts(self) -> None:
        """Which script a hash is."""
        self._names = {}
        for file in backlog.LUA.iterdir():
            state, arrivals = backlog.STATE, (*backlog.STATE, "arrivals")
            for names in ((file.stem,), (*state, file.stem), (*arrivals, file.stem)):
                text = backlog.read_scripts(names)
                self._names[hashlib.sha1(text.encode()).hexdigest()] = file.stem

    def __call__(self, command: tuple[Any, ...], reply: Any) -> None:
        name, *args = command
        if name == "EVALSHA":
            self._script(*args, reply=reply)
        elif name not in _READS:
            arguments = [_text(arg) for arg in args]
            getattr(self, f"_{name.lower()}")(arguments, reply)

    def _script(self, sha: str, number: int, *args: Any, reply: Any) -> None:
        name, arguments = self._names[sha], [_text(arg) for arg in args]
        wanted = getattr(self.scripts, name)(arguments[:number], arguments[number:])
        got = _plain(reply)
        got = _PARTS.get(name, lambda reply: reply)(got)
        given = [arg[:40] for arg in arguments]
        assert got == wanted, f"{name}{given} replied {got}; it should have been {wanted}"

    # The commands that are no scripts.

    def _sadd(self, args: list[str], _: Any) -> None:
        assert args[0] == keys.PAUSED, args
        self.expected.paused.add(args[1])

    def _srem(self, args: list[str], _: Any) -> None:
        assert args[0] == keys.PAUSED, args
        self.expected.paused.discard(args[1])

    def _del(self, args: list[str], _: Any) -> None:
        for key in args:
            self.expected.keys.pop(key, None)

    def _rpop(self, args: list[str], _: Any) -> None:
        model = args[0].removeprefix(keys.TICKETS_PREFIX)
        self.expected.tickets[model] = max(0, self.expected.tickets[model] - 1)

    def _xrange(self, args: list[str], reply: Any) -> None:
        """Nothing changes by it."""

    def _xdel(self, args: list[str], _: Any) -> None:
        assert args[0] == keys.LEDGER, args
        self.expected.ledger = [r for r in self.expected.ledger if r.record_id not in args[1:]]

    def _expire(self, args: list[str], _: Any) -> None:
        log = self.expected.logs.get(args[0].removeprefix(keys.LOG_PREFIX))
        if log:
            log.has_ttl = True

    def _hincrby(self, args: list[str], reply: Any) -> None:
        if args[0] == keys.COUNTS:
            self.expected.counts[args[1]] += int(args[2])
        else:
            assert args[0].startswith(keys.worker("")), args
            self.expected.keys[args[0]] = str(reply)

    def _publish(self, args: list[str], _: Any) -> None:
        worker = args[0].removeprefix(keys.control(""))
        self.orders.append((worker, args[1]))


def _text(value: Any) -> str:
    """An argument as Redis gets it."""
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _plain(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_plain(part) for part in reply]
    return reply.decode("latin-1") if isinstance(reply, bytes) else reply
