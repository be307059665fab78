"""Which web pages may use this API: they run in browsers that reach what their authors do not.

A page's own origin is told by the browser (RFC 6454, the Fetch standard's CORS protocol). The name
in Host is checked too: a page whose name has been pointed here would pass for one of ours.
"""

from urllib.parse import urlsplit

from flask import Flask, Response, request

from tasks.contract.errors import HostNotAllowedError, OriginNotAllowedError
from tasks.contract.settings import Settings

PREFLIGHT_S = "600"


class Sites:
    """What the settings allow."""

    def __init__(self, settings: Settings) -> None:
        self._hosts = frozenset(settings.hosts)
        self._origins = frozenset(settings.origins)

    def check(self) -> Response | None:
        """Lets a request pass, refuses it, or answers a browser that asks before it sends one.

        Raises:
            HostNotAllowedError: it was sent to a name that is not ours.
            OriginNotAllowedError: a page of another site sends it.
        """
        if self._hosts and _host_of(f"//{request.host}") not in self._hosts:
            raise HostNotAllowedError
        origin = request.headers.get("Origin")
        if origin is None or origin.partition("://")[2] == request.host:
            return None
        if not self._allows(origin):
            raise OriginNotAllowedError
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return Response(status=204)
        return None

    def add_headers(self, response: Response) -> Response:
        """Tells the browser that the page may read the answer."""
        origin = request.headers.get("Origin")
        if origin is None or not self._allows(origin):
            return response
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers.add("Vary", "Origin")
        response.headers["Access-Control-Expose-Headers"] = "*"
        if request.method == "OPTIONS":
            wanted = request.headers.get("Access-Control-Request-Headers", "")
            response.headers["Access-Control-Allow-Headers"] = wanted
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
            response.headers["Access-Control-Max-Age"] = PREFLIGHT_S
        return response

    def _allows(self, origin: str) -> bool:
        return origin in self._origins or "*" in self._origins


def register(app: Flask, settings: Settings) -> None:
    """Has every request checked, WebSockets included."""
    sites = Sites(settings)
    app.before_request(sites.check)
    app.after_request(sites.add_headers)


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
