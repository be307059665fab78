"""Calls the webhooks of ended jobs, signed as Standard Webhooks says.

At least once: a receiver knows a repeat by its `webhook-id`. What is connected to is the very
address that was checked (targets.py), so no name can lead inside after its check. Only the API,
maintenance and the command line import this module.
"""

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import httpx
import orjson
from sqlalchemy.exc import SQLAlchemyError
from standardwebhooks import Webhook

from db import migrate
from db.models import WebhookAttempt, WebhookDelivery
from db.webhooks import claim_due, note_attempt
from tasks.errors import InvalidRequestError
from tasks.message import new_id
from tasks.settings import Settings
from tasks.targets import check_url, parse, refusal, resolve

log = logging.getLogger(__name__)

MOST_ERROR_CHARS = 200
TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 5.0

# 5 s, 10 s, … 11.4 h: with the jitter about a day in all.
RETRY_AFTER_S = tuple(5 * 2**n for n in range(14))
JITTER = 0.1

AT_ONCE = 20
THREADS = 8
# Longer than a round lasts whose receivers and name servers are all silent.
HOLD_S = 180.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one call went: a status, or an error when there was no answer."""

    status_code: int | None
    error: str | None
    duration_ms: int

    @property
    def is_delivered(self) -> bool:
        return self.status_code is not None and 200 <= self.status_code < 300

    @property
    def summary(self) -> str:
        return self.error or f"status {self.status_code}"


def check_webhook(url: str, settings: Settings) -> None:
    """Refuses a webhook that could not be called.

    Raises:
        InvalidRequestError: no secret is set to sign with, or `check_url` refuses the URL.
    """
    if not settings.signing_secrets:
        raise refusal("webhooks are off here; the operator turns them on: SLUICE_WEBHOOK_SECRETS")
    check_url(url, settings.webhook_allow_private)


def make_event(job_id: str, event_type: str, created_at: datetime) -> tuple[str, bytes]:
    """The event's id, the same at each try, and its body."""
    event_id = f"evt_{job_id.removeprefix('job_')}"
    event = {
        "id": event_id,
        "object": "event",
        "type": event_type,
        "created_at": int(created_at.timestamp()),
        "data": {"id": job_id},
    }
    return event_id, orjson.dumps(event)


class Sender:
    """Makes single calls; threads may share it. Each of the secrets signs every call."""

    def __init__(
        self, secrets: tuple[str, ...], allow_private: bool, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._signers = [Webhook(secret) for secret in secrets]
        self._allow_private = allow_private
        self._timeout_s = timeout_s
        # Takes long to make. Knows SSL_CERT_FILE, for receivers with certificates of their own.
        self._tls = httpx.create_ssl_context()

    def send(self, delivery_id: str, url: str, body: bytes, now: datetime) -> Outcome:
        """Posts the body. Whatever goes wrong is in the outcome; no redirect is followed."""
        start_s = time.monotonic()
        status, error = None, None
        try:
            status = self._send(delivery_id, url, body, now)
        except TimeoutError:
            error = f"no answer within {self._timeout_s:g} s"
        except InvalidRequestError as refused:
            error = str(refused)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as failed:
            error = f"{type(failed).__name__}: {failed}"[:MOST_ERROR_CHARS]
        return Outcome(status, error, round((time.monotonic() - start_s) * 1000))

    def _send(self, delivery_id: str, url: str, body: bytes, now: datetime) -> int:
        if not self._signers:
            raise refusal("there is no secret to sign with; set SLUICE_WEBHOOK_SECRETS")
        target = parse(url)
        addresses = resolve(target, self._allow_private)
        # The library takes the moment for UTC, whatever it says.
        utc = now.astimezone(UTC)
        signatures = (s.sign(delivery_id, utc, body.decode()) for s in self._signers)
        headers = {
            "host": target.netloc.decode(),
            "content-type": "application/json",
            "user-agent": "sluice",
            "webhook-id": delivery_id,
            "webhook-timestamp": str(int(utc.timestamp())),
            "webhook-signature": " ".join(signatures),
        }
        return asyncio.run(self._post(target, addresses, headers, body))

    async def _post(
        self, target: httpx.URL, addresses: list[str], headers: dict[str, str], body: bytes
    ) -> int:
        """The status of the first address that can be connected to; reads no body."""
        failure: Exception = OSError("the host has no address")
        # Not the environment's proxy: it would look up the name again.
        connections = httpx.AsyncClient(
            verify=self._tls,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        )
        # httpx bounds each read, which a receiver that drips can repeat for ever.
        async with asyncio.timeout(self._timeout_s), connections as client:
            for address in addresses:
                call = client.stream(
                    "POST",
                    target.copy_with(host=address),
                    content=body,
                    headers=headers,
                    # TLS asks for and verifies the name, not the address.
                    extensions={"sni_hostname": target.raw_host.decode().rstrip(".")},
                )
                try:
                    async with call as response:
                        return response.status_code
                except (httpx.ConnectError, httpx.ConnectTimeout) as failed:
                    failure = failed
        raise failure


def send_test(url: str, settings: Settings) -> Outcome:
    """Sends an event of type `webhook.test`.

    Raises:
        InvalidRequestError: `check_webhook` refuses the URL.
    """
    check_webhook(url, settings)
    now = datetime.now(UTC)
    event_id, body = make_event(new_id(), "webhook.test", now)
    sender = Sender(settings.signing_secrets, settings.webhook_allow_private)
    return sender.send(event_id, url, body, now)


class Deliverer:
    """Makes the calls that SQL says are due; one per process."""

    def __init__(self, database_url: str, settings: Settings) -> None:
        self._url = database_url
        self._sender = Sender(settings.signing_secrets, settings.webhook_allow_private)
        self._busy = threading.Lock()
        self._is_migrated = False
        self._is_away = False

    def deliver(self) -> Counter[str]:
        """Makes a round of calls; returns what came of them (`decide`), how often.

        A database that is away is worth one warning: what is due waits there. A round that finds
        another one under way (receivers may be slow) does nothing.
        """
        if not self._busy.acquire(blocking=False):
            return Counter()
        try:
            return self._deliver()
        except (SQLAlchemyError, OSError) as away:
            if not self._is_away:
                log.warning("webhooks: the database is away, calls wait: %s", away)
            self._is_away = True
            return Counter()
        finally:
            self._busy.release()

    def _deliver(self) -> Counter[str]:
        if not self._is_migrated:
            migrate(self._url)
            self._is_migrated = True
        due = claim_due(self._url, AT_ONCE, HOLD_S)
        if self._is_away:
            log.info("webhooks: the database is back")
        self._is_away = False
        if not due:
            return Counter()
        with ThreadPoolExecutor(THREADS) as pool:
            return Counter(pool.map(self._attempt, due))

    def _attempt(self, delivery: WebhookDelivery) -> str:
        at = datetime.now(UTC)
        event_id, body = make_event(delivery.job_id, delivery.type, delivery.created_at)
        outcome = self._sender.send(event_id, delivery.url, body, at)
        attempt = WebhookAttempt(
            job_id=delivery.job_id,
            attempt=delivery.attempts + 1,
            at=at,
            status_code=outcome.status_code,
            error=outcome.error,
            duration_ms=outcome.duration_ms,
        )
        state, wait_s = decide(outcome, attempt.attempt)
        next_at = None if wait_s is None else datetime.now(UTC) + timedelta(seconds=wait_s)
        # Its URL may hold a secret too.
        form = "webhook %s: %s in attempt %d after %d ms, now %s"
        details = (event_id, outcome.summary, attempt.attempt, outcome.duration_ms, state)
        log.info(form, *details)
        note_attempt(self._url, attempt, state, next_at)
        return state


def decide(outcome: Outcome, attempt: int) -> tuple[str, float | None]:
    """The delivery's state after that attempt, counted from 1, and the seconds to the next."""
    if outcome.is_delivered:
        return "delivered", None
    if outcome.status_code == 410:
        return "disabled", None
    if attempt > len(RETRY_AFTER_S):
        return "failed", None
    # No secret: it only keeps calls apart that failed together.
    return "pending", RETRY_AFTER_S[attempt - 1] * random.uniform(1, 1 + JITTER)  # noqa: S311
