"""Where a webhook may go: plain http(s) URLs whose host is on the public internet."""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import httpx

from tasks.contract.errors import InvalidRequestError
from tasks.contract.settings import Settings

MOST_URL_CHARS = 2000
DEFAULT_PORTS = {"http": 80, "https": 443}

LOOKUP_S = 5.0
# A silent name server blocks a thread for half a minute.
MOST_LOOKUPS = 500

# From a name to its addresses, or an OSError.
Ask = Callable[[bytes], list[str]]

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# What Python 3.11's lists do not have, or have in part (IANA's special-purpose registries).
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "2001::/23", "3fff::/20")
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def look_up(name: bytes) -> list[str]:
    """The addresses of a name, as long as the system takes to find them.

    Raises:
        OSError: the name does not resolve, at least at the moment.
    """
    # As bytes: Python refuses some strings with another exception.
    return addresses_in(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))


def addresses_in(found: Sequence[Any]) -> list[str]:
    """The addresses in an answer of `getaddrinfo`."""
    return [str(address[0]) for *_, address in found]


def check_url(url: str, settings: Settings, ask: Ask = look_up) -> None:
    """Refuses a URL that webhooks must not call.

    A name that `ask` has no answer for may pass: whoever calls it asks again, and decides.

    Raises:
        InvalidRequestError: it is no plain http(s) URL, its port is not allowed, or its host is not
            public.
    """
    target = parse(url, settings.webhook_port_ranges)
    if settings.webhook_allow_private:
        return
    with suppress(OSError):
        resolve(target, allow_private=False, ask=ask)


def parse(url: str, ports: Sequence[range]) -> httpx.URL:
    """The URL in its parts.

    Raises:
        InvalidRequestError: it is no plain http(s) URL, or its port is none of these.
    """
    if len(url) > MOST_URL_CHARS:
        raise refusal(f"the URL is longer than {MOST_URL_CHARS:,} characters; shorten it")
    if not url.isprintable() or " " in url:
        raise refusal("the URL holds spaces or control characters; percent-encode them")
    try:
        target = httpx.URL(url)
    except httpx.InvalidURL as wrong:
        raise refusal(f"the URL cannot be read ({wrong}); correct it") from None
    if target.scheme not in ("http", "https") or not target.host:
        raise refusal("the URL must begin with https:// or http:// and a host")
    if target.userinfo:
        raise refusal("the URL holds credentials; remove them and check the signature instead")
    if target.port is not None and not 0 < target.port < 2**16:
        raise refusal("the URL's port must be from 1 to 65535")
    port = target.port or DEFAULT_PORTS[target.scheme]
    if not any(port in allowed for allowed in ports):
        known = ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in ports)
        raise refusal(
            f"the URL's port {port} is not allowed; use one of {known}, "
            "or ask the operator for SLUICE_WEBHOOK_PORTS"
        )
    return target


def resolve(target: httpx.URL, allow_private: bool, ask: Ask = look_up) -> list[str]:
    """The addresses of the host, all of them allowed; only a name is asked for.

    Raises:
        InvalidRequestError: one is not public.
        OSError: the name does not resolve, at least at the moment.
    """
    addresses = _literal(target.raw_host) or ask(target.raw_host)
    if not allow_private and not all(is_public(address) for address in addresses):
        raise refusal(
            "the URL's host is not public; use one that is, "
            "or ask the operator for SLUICE_WEBHOOK_ALLOW_PRIVATE"
        )
    return addresses


def _literal(host: bytes) -> list[str]:
    """The address that the host is, in whatever spelling; empty: it is a name."""
    text = host.decode()
    with suppress(OSError):
        return [socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text))]
    # Takes all that the system's lookup would: 127.1, 0x7f000001, 2130706433.
    with suppress(OSError):
        return [socket.inet_ntoa(socket.inet_aton(text))]
    return []


class Lookups:
    """Does `resolve` for an event loop: in threads, each name once at a time.

    The system's lookup cannot be bounded or stopped: its caller times out, the thread goes on. A
    pool's threads would hold up the exit of the process, these do not.
    """

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._under_way: dict[bytes, asyncio.Task[list[str] | Exception]] = {}
        self._free = asyncio.Semaphore(MOST_LOOKUPS)

    async def resolve(self, target: httpx.URL) -> list[str]:
        """The addresses of the host, all of them allowed.

        Raises:
            InvalidRequestError: one is not public.
            OSError: the name does not resolve, at least at the moment; or it took too long.
        """
        name = target.raw_host
        lookup = self._under_way.get(name)
        if lookup is None:
            lookup = asyncio.create_task(self._resolve(target))
            self._under_way[name] = lookup
            lookup.add_done_callback(lambda _: self._under_way.pop(name))
        try:
            async with asyncio.timeout(LOOKUP_S):
                found = await asyncio.shield(lookup)
        except TimeoutError:
            raise OSError(f"no address of the host within {LOOKUP_S:g} s") from None
        if isinstance(found, Exception):
            raise found
        return found

    async def _resolve(self, target: httpx.URL) -> list[str] | Exception:
        async with self._free:
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[list[str] | Exception] = loop.create_future()

            def settle(found: list[str] | Exception) -> None:
                if not answer.done():
                    answer.set_result(found)

            def look_up() -> None:
                found: list[str] | Exception
                try:
                    found = resolve(target, self._allow_private)
                except (InvalidRequestError, OSError) as failed:
                    found = failed
                # The loop may have ended meanwhile.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(settle, found)

            threading.Thread(target=look_up, name="lookup", daemon=True).start()
            return await answer


def is_public(address: str) -> bool:
    """Whether the whole internet may reach it; an IPv4 address inside an IPv6 one counts too."""
    ip = ipaddress.ip_address(address)
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    inner = ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64:
        inner = ipaddress.IPv4Address(ip.packed[-4:])
    return is_public(str(inner)) if inner else ip.is_global and ip in _GLOBAL_UNICAST


def refusal(message: str) -> InvalidRequestError:
    """The error of a webhook that cannot be called."""
    return InvalidRequestError(f"`webhook`: {message}.", param="webhook")
