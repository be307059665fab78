"""One call of a webhook, signed as in Standard Webhooks; deliveries.py schedules them.

The connection goes to the very address that was checked (targets.py), so no name can resolve to a
private one after its check.
"""

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
import orjson
from standardwebhooks import Webhook

from tasks.contract.errors import InvalidRequestError
from tasks.contract.job import new_id
from tasks.contract.settings import Settings
from tasks.maintenance.targets import Ask, Lookups, check_url, look_up, parse, refusal

log = logging.getLogger(__name__)

MOST_ERROR_CHARS = 200
TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 5.0

# 5 s, 10 s, … 11.4 h: with the jitter about a day in all.
RETRY_AFTER_S = tuple(5 * 2**n for n in range(14))
JITTER = 0.1


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


def check_webhook(url: str, settings: Settings, ask: Ask = look_up) -> None:
    """Refuses a webhook that could not be called.

    Raises:
        InvalidRequestError: no secret is set to sign with, or `check_url` refuses the URL.
    """
    if not settings.signing_secrets:
        raise refusal("webhooks are off here; the operator turns them on: SLUICE_WEBHOOK_SECRETS")
    check_url(url, settings, ask)


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
    """Makes single calls, on any event loop. Each of the secrets signs every call."""

    def __init__(self, settings: Settings, timeout_s: float = TIMEOUT_S) -> None:
        self._signers = [Webhook(secret) for secret in settings.signing_secrets]
        self._ports = settings.webhook_port_ranges
        self._lookups = Lookups(settings.webhook_allow_private)
        self._timeout_s = timeout_s
        # Takes long to make. Knows SSL_CERT_FILE, for receivers with certificates of their own.
        self._tls = httpx.create_ssl_context()

    async def send(self, delivery_id: str, url: str, body: bytes, now: datetime) -> Outcome:
        """Posts the body. Whatever goes wrong is in the outcome; no redirect is followed."""
        start_s = time.monotonic()
        try:
            return await self.call(delivery_id, url, body, now)
        except InvalidRequestError as refused:
            return Outcome(None, str(refused), _ms_since(start_s))

    async def call(self, delivery_id: str, url: str, body: bytes, now: datetime) -> Outcome:
        """The same, for who wants to know whether the URL or the receiver is wrong.

        Raises:
            InvalidRequestError: the URL must not be called, or there is no secret to sign with.
        """
        start_s = time.monotonic()
        status, error = None, None
        try:
            # httpx bounds each read, which a slow receiver can repeat for ever.
            async with asyncio.timeout(self._timeout_s):
                status = await self._send(delivery_id, url, body, now)
        except TimeoutError:
            error = f"no answer within {self._timeout_s:g} s"
        except InvalidRequestError:
            raise
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as failed:
            error = _describe(failed)
        except Exception as failed:  # a library's own mistake, which no next try need repeat
            log.exception("webhook %s: not called", delivery_id)
            error = _describe(failed)
        return Outcome(status, error, _ms_since(start_s))

    async def _send(self, delivery_id: str, url: str, body: bytes, now: datetime) -> int:
        if not self._signers:
            raise refusal("there is no secret to sign with; set SLUICE_WEBHOOK_SECRETS")
        target = parse(url, self._ports)
        addresses = await self._lookups.resolve(target)
        # The library ignores the timezone and takes the time for UTC.
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
        return await self._post(target, addresses, headers, body)

    async def _post(
        self, target: httpx.URL, addresses: list[str], headers: dict[str, str], body: bytes
    ) -> int:
        """The status of the first address that can be connected to; reads no body."""
        failure: Exception = OSError("the host has no address")
        # A client for each call: names may share an address, and must not share a connection.
        # Not the environment's proxy: it would resolve the name again.
        async with httpx.AsyncClient(
            verify=self._tls,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        ) as client:
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


def _ms_since(start_s: float) -> int:
    return round((time.monotonic() - start_s) * 1000)


def _describe(failed: Exception) -> str:
    """The error without what a receiver may have put in that SQL or a log line cannot hold."""
    text = f"{type(failed).__name__}: {failed}"[:MOST_ERROR_CHARS]
    return "".join(char if char.isprintable() else "?" for char in text)


def send_test(url: str, settings: Settings) -> Outcome:
    """Sends an event of type `webhook.test`.

    Raises:
        InvalidRequestError: the URL must not be called, or there is no secret to sign with.
    """
    now = datetime.now(UTC)
    event_id, body = make_event(new_id(), "webhook.test", now)
    return asyncio.run(Sender(settings).call(event_id, url, body, now))


def decide(outcome: Outcome, attempt: int) -> tuple[str, float | None]:
    """The delivery's state after that attempt, counted from 1, and the seconds to the next."""
    if outcome.is_delivered:
        return "delivered", None
    if outcome.status_code == 410:
        return "disabled", None
    if attempt > len(RETRY_AFTER_S):
        return "failed", None
    # Not security: it only spreads calls that failed together.
    return "pending", RETRY_AFTER_S[attempt - 1] * random.uniform(1, 1 + JITTER)  # noqa: S311
