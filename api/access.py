"""Who may use which route: one table, and the check that goes before every route.

The key comes as `Authorization: Bearer KEY`. A browser's WebSocket can set no headers, but name
subprotocols: there it comes as `openai-insecure-api-key.KEY`, as with OpenAI's realtime API.
"""

from functools import partial

from flask import Flask, g, request
from werkzeug.routing import Map, Rule

from api.keyring import Keyring
from api.principal import Principal
from tasks.contract.access import Role

KEY_PROTOCOL = "openai-insecure-api-key."
SOCKET = "SOCKET"

# By method and rule, as Flask has it; None: everybody, without a key.
WHO: dict[str, Role | None] = {
    "POST /v1/chat/completions": Role.USER,
    "POST /v1/completions": Role.USER,
    "POST /v1/embeddings": Role.USER,
    "GET /v1/models": Role.USER,
    "GET /v1/models/<path:model_id>": Role.USER,
    "SOCKET /v1/chat/completions": Role.USER,
    "SOCKET /v1/completions": Role.USER,
    # Jobs of its tenant.
    "GET /v1/jobs": Role.USER,
    "POST /v1/jobs": Role.USER,
    "GET /v1/jobs/<string:job_id>": Role.USER,
    "GET /v1/jobs/<string:job_id>/events": Role.USER,
    "SOCKET /v1/jobs/<job_id>/events": Role.USER,
    "GET /v1/jobs/<string:job_id>/webhook": Role.USER,
    "POST /v1/jobs/<string:job_id>/cancel": Role.USER,
    "POST /v1/jobs/<string:job_id>/retry": Role.USER,
    "GET /v1/usage": Role.USER,
    # The whole deployment, of all tenants.
    "GET /metrics": Role.OPERATOR,
    "GET /v1/admin/dead": Role.OPERATOR,
    "GET /v1/admin/dead/<string:job_id>": Role.OPERATOR,
    "DELETE /v1/admin/dead/<string:job_id>": Role.OPERATOR,
    "POST /v1/admin/dead/<string:job_id>/retry": Role.OPERATOR,
    "GET /v1/admin/workers": Role.OPERATOR,
    "GET /v1/admin/targets": Role.OPERATOR,
    "POST /v1/admin/workers/<string:worker_id>/drain": Role.OPERATOR,
    "POST /v1/admin/models/<model:model_id>/pause": Role.OPERATOR,
    "POST /v1/admin/models/<model:model_id>/resume": Role.OPERATOR,
    "GET /v1/admin/usage": Role.OPERATOR,
    "GET /v1/admin/models": Role.ADMIN,
    "PUT /v1/admin/models/<model:model_id>": Role.ADMIN,
    "DELETE /v1/admin/models/<model:model_id>": Role.ADMIN,
    "GET /v1/admin/keys": Role.ADMIN,
    "POST /v1/admin/keys": Role.ADMIN,
    "GET /v1/admin/keys/<string:key_id>": Role.ADMIN,
    "PUT /v1/admin/keys/<string:key_id>": Role.ADMIN,
    "POST /v1/admin/keys/<string:key_id>/revoke": Role.ADMIN,
    "POST /v1/admin/keys/<string:key_id>/rotate": Role.ADMIN,
    "GET /v1/admin/tenants": Role.ADMIN,
    "GET /v1/admin/tenants/<string:tenant_id>": Role.ADMIN,
    "PUT /v1/admin/tenants/<string:tenant_id>": Role.ADMIN,
    # Load balancers and people without a key: what this is, and whether it works.
    "GET /health": None,
    "GET /health/live": None,
    "GET /health/ready": None,
    "GET /ping": None,
    "GET /load": None,
    "GET /version": None,
    "GET /openapi.json": None,
    "GET /docs/": None,
    "GET /docs/openapi.json": None,
    "GET /docs/swagger": None,
    "GET /docs/swagger/<path:filename>": None,
    "GET /docs/static/<path:filename>": None,
    "GET /docs/oauth2-redirect.html": None,
    "GET /static/<path:filename>": None,
}


def register(app: Flask, keyring: Keyring) -> None:
    """Has every request checked, WebSockets included."""
    app.before_request(partial(_check, keyring))


def get_principal() -> Principal:
    """Who has sent the current request; of routes that need no key there is none."""
    principal: Principal = g.principal
    return principal


def check_table(routes: Map) -> None:
    """Stops an app with a route of which the table says nothing.

    Raises:
        AssertionError: there is one.
    """
    if missing := [row for rule in routes.iter_rules() for row in rows_of(rule) if row not in WHO]:
        raise AssertionError(f"api/access.py does not say who may use {', '.join(missing)}")


def rows_of(rule: Rule) -> list[str]:
    """The rows of the table that a rule needs."""
    if rule.websocket:
        return [f"{SOCKET} {rule.rule}"]
    # HEAD is a GET. OPTIONS says no more than which methods there are.
    return [f"{method} {rule.rule}" for method in sorted((rule.methods or set()) - _ASIDE)]


_ASIDE = {"HEAD", "OPTIONS"}


def _check(keyring: Keyring) -> None:
    """Lets a request pass whose key may use the route.

    Raises:
        AuthenticationError: the route needs a key, and there is none that is valid.
        PermissionDeniedError: the key lacks the role.
        DatabaseUnavailableError: nobody can tell.
    """
    rule = request.url_rule
    if rule is None or request.method == "OPTIONS":
        return
    method = {"HEAD": "GET"}.get(request.method, request.method)
    role = WHO[f"{SOCKET if rule.websocket else method} {rule.rule}"]
    if role is not None:
        g.principal = keyring.find(_shown_key(is_socket=rule.websocket))
        g.principal.check_role(role)


def _shown_key(*, is_socket: bool) -> str | None:
    """The key of the request; what is no key, but should be one, is looked up as well."""
    header = request.headers.get("Authorization")
    if header is not None:
        scheme, _, key = header.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else header
    if is_socket:
        offered = request.headers.get("Sec-WebSocket-Protocol", "").split(",")
        names = [name.strip() for name in offered]
        return next((n[len(KEY_PROTOCOL) :] for n in names if n.startswith(KEY_PROTOCOL)), None)
    return None
