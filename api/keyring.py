"""The keys that this API process knows, each as the database had it some seconds ago at most.

One greenlet reads them all: those that requests ask for, in one query for all that wait, and every
two seconds those that are in use. So a key costs a request nothing but its first time, a revocation
is noticed within seconds by whoever has a stream open, and a flood of wrong keys takes one
connection of the database.
"""

import hmac
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import gevent
from gevent.event import Event
from sqlalchemy.exc import SQLAlchemyError

from api.principal import ANYBODY, Principal
from db import keys
from tasks.contract.access import DEFAULT_TENANT, Role
from tasks.contract.errors import AuthenticationError, DatabaseUnavailableError

log = logging.getLogger(__name__)

REFRESH_S = 2.0
# What is older is read again before it is believed; a refresh may take its time.
FRESH_S = 4.0
LONGEST_READ_S = 2.0
# A key that is not used for so long is not refreshed any more.
IN_USE_S = 10.0
MOST_KEYS = 10_000
MOST_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class _Known:
    """What the database had: a key, or none; and when it is refused by itself."""

    key: keys.FoundKey | None
    read_s: float

    @property
    def dies_s(self) -> float | None:
        lives_s = self.key.lives_s if self.key else None
        return None if lives_s is None else self.read_s + lives_s

    def is_valid(self, now_s: float) -> bool:
        is_alive = self.dies_s is None or now_s < self.dies_s
        return self.key is not None and self.key.is_enabled and is_alive


@dataclass(slots=True)
class _Round:
    """Digests that are read together, and those who wait for them."""

    digests: set[str] = field(default_factory=set)
    done: Event = field(default_factory=Event)
    has_failed: bool = False


class Keyring:
    """Tells whose a key is. Where it cannot, it refuses: it never lets anybody in for that."""

    def __init__(self, url: str, admin_key: str, grace_s: float, *, may_be_open: bool) -> None:
        """`may_be_open`: no key is needed while there is none."""
        self._url = url
        self._grace_s = grace_s
        self._admin = _admin(admin_key) if admin_key else None
        self._may_be_open = may_be_open and not admin_key
        self._without_row = {each.digest for each in (ANYBODY, self._admin) if each}
        self._known: dict[str, _Known] = {}
        # What is no key has a place of its own, so that it cannot crowd out those that are.
        self._unknown: dict[str, _Known] = {}
        self._used_s: dict[str, float] = {}
        self._to_note: set[str] = set()
        self._watching: dict[str, list[Callable[[], object]]] = {}
        self._next = _Round()
        self._wake = Event()
        self._answered_s = 0.0
        self._is_away = False
        self._reading_since_s: float | None = None

    def start(self) -> None:
        """Starts the greenlets that read, and note the use of keys."""
        gevent.spawn(self._read_for_ever)
        gevent.spawn(self._note_for_ever)

    def find(self, secret: str | None) -> Principal:
        """Whose the secret is; None: none was shown.

        All that are refused, whatever for, are looked up alike.

        Raises:
            AuthenticationError: there is no such key, or it may not be used.
            DatabaseUnavailableError: nobody can tell at the moment.
        """
        if self._may_be_open and self._is_open():
            return ANYBODY
        if secret is None:
            raise AuthenticationError
        return self._find(keys.digest_of(secret))

    def find_again(self, principal: Principal) -> Principal:
        """Whose the key is by now, for those who showed it some time ago.

        Raises:
            AuthenticationError: it may not be used any more.
            DatabaseUnavailableError: nobody can tell at the moment.
        """
        if principal.digest != ANYBODY.digest:
            return self._find(principal.digest)
        return self.find(None)

    def _find(self, digest: str) -> Principal:
        if self._admin and hmac.compare_digest(digest, self._admin.digest):
            return self._admin
        now_s = time.monotonic()
        known = self._look_up(digest)
        if known.key is None or not known.is_valid(now_s):
            raise AuthenticationError
        self._used_s[digest] = now_s
        self._to_note.add(known.key.id)
        return _principal(known.key, digest)

    @contextmanager
    def watching(self, principal: Principal, on_refused: Callable[[], object]) -> Iterator[None]:
        """Calls this when the key is found to be refused while the block runs; perhaps again."""
        watchers = self._watching.setdefault(principal.digest, [])
        watchers.append(on_refused)
        try:
            yield
        finally:
            watchers.remove(on_refused)
            if not watchers:
                self._watching.pop(principal.digest, None)

    def _is_open(self) -> bool:
        """Whether there is no key at all; once there was one, it stays closed."""
        if not self._answered_s or time.monotonic() - self._answered_s > self._grace_s:
            self._await_read(set())
        return self._may_be_open

    def _look_up(self, digest: str) -> _Known:
        """What is known of it: fresh, or not too old while the database is away.

        Raises:
            DatabaseUnavailableError: neither.
        """
        known = self._get(digest)
        if known and time.monotonic() - known.read_s < FRESH_S:
            return known
        try:
            self._await_read({digest})
        except DatabaseUnavailableError:
            if known and known.key and time.monotonic() - known.read_s < self._grace_s:
                return known
            raise
        # None: so many others came meanwhile that it was dropped again.
        return self._get(digest) or _Known(None, 0.0)

    def _get(self, digest: str) -> _Known | None:
        return self._known.get(digest) or self._unknown.get(digest)

    def _await_read(self, digests: Collection[str]) -> None:
        """Waits until these are read.

        Raises:
            DatabaseUnavailableError: they are not, or it is known to be away.
        """
        since_s = self._reading_since_s
        is_stuck = since_s is not None and time.monotonic() - since_s > LONGEST_READ_S
        if self._is_away or is_stuck:
            raise DatabaseUnavailableError
        joined = self._next
        joined.digests.update(digests)
        self._wake.set()
        if not joined.done.wait(LONGEST_READ_S) or joined.has_failed:
            raise DatabaseUnavailableError

    def _read_for_ever(self) -> None:
        refresh_s = 0.0
        while True:
            self._wake.wait(max(refresh_s - time.monotonic(), 0))
            self._wake.clear()
            now, self._next = self._next, _Round()
            if time.monotonic() >= refresh_s:
                refresh_s = time.monotonic() + REFRESH_S
                now.digests |= self._in_use()
            try:
                self._read(now)
                self._end_refused()
            except Exception:  # without this greenlet nobody would get in any more
                log.exception("keys: a round failed, and the next one comes")
                now.has_failed = True
            now.done.set()

    def _in_use(self) -> set[str]:
        """Those to read again."""
        earliest_s = time.monotonic() - IN_USE_S
        self._used_s = {digest: at for digest, at in self._used_s.items() if at > earliest_s}
        return self._used_s.keys() | self._watching.keys() - self._without_row

    def _read(self, now: _Round) -> None:
        self._reading_since_s = time.monotonic()
        try:
            wanted = list(now.digests)
            # Also when nothing is wanted: whether there are keys, and whether the database answers.
            for first in range(0, len(wanted) or 1, MOST_AT_ONCE):
                part, begun_s = wanted[first : first + MOST_AT_ONCE], time.monotonic()
                self._store(part, keys.find(self._url, part), begun_s)
                gevent.sleep(0)
        except SQLAlchemyError as failure:
            if not self._is_away:
                log.warning("keys cannot be read, those that are known go on: %s", failure)
            self._is_away = now.has_failed = True
        else:
            self._is_away = False
        finally:
            self._reading_since_s = None

    def _store(self, digests: Collection[str], found: keys.Found, read_s: float) -> None:
        self._answered_s = read_s
        self._may_be_open &= not found.has_any
        for digest in digests:
            key = found.keys.get(digest)
            place, other = (self._known, self._unknown)[:: 1 if key else -1]
            other.pop(digest, None)
            place.pop(digest, None)  # the latest is the last
            place[digest] = _Known(key, read_s)
            if len(place) > MOST_KEYS:
                del place[next(iter(place))]

    def _end_refused(self) -> None:
        for digest, watchers in list(self._watching.items()):
            for on_refused in list(watchers) if self._is_refused(digest) else ():
                on_refused()

    def _is_refused(self, digest: str) -> bool:
        """Whether a key that was accepted is known to be refused by now."""
        if digest == ANYBODY.digest:
            return not self._may_be_open
        known = self._get(digest)
        return known is not None and not known.is_valid(time.monotonic())

    def _note_for_ever(self) -> None:
        """At most once a minute, apart from who reads: it may wait for others that write."""
        while True:
            gevent.sleep(REFRESH_S)
            used, self._to_note = self._to_note, set()
            if not used:
                continue
            try:
                keys.note_used(self._url, used)
            except SQLAlchemyError as failure:
                log.warning("the use of keys is not noted: %s", failure)
            except Exception:  # a failed round is not to be the last
                log.exception("keys: their use is not noted")
            gevent.sleep(keys.USE_NOTED_S)


def _admin(key: str) -> Principal:
    roles = frozenset({Role.ADMIN})
    return Principal(DEFAULT_TENANT, "admin", roles, digest=keys.digest_of(key))


def _principal(key: keys.FoundKey, digest: str) -> Principal:
    return Principal(
        key.tenant,
        key.id,
        frozenset(map(Role, key.roles)),
        None if key.models is None else frozenset(key.models),
        None if key.endpoints is None else frozenset(key.endpoints),
        key.weight,
        key.limits,
        digest,
    )
