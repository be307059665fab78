"""The Flask app: OpenAI's endpoints, health, and the docs page."""

import gc
import logging
from importlib.metadata import version
from typing import Any

import gevent
import orjson
from flask import Response, request
from flask.json.provider import JSONProvider
from flask_openapi3 import Info, OpenAPI
from werkzeug.routing import PathConverter

from api import access, errors, instruments, sites, told, traces
from api import openapi as document
from api.encoders import websocket
from api.routes import admin, health, jobs, metrics, usage
from api.routes import keys as key_routes
from api.routes import models as model_routes
from api.routes import openai as routes
from api.server import is_loopback
from api.services import Services
from tasks.contract import logs, tracing
from tasks.contract.settings import get_settings

log = logging.getLogger(__name__)


class Json(JSONProvider):
    """What routes return, in JSON."""

    def dumps(self, obj: Any, **_kwargs: Any) -> str:
        return orjson.dumps(obj).decode()

    def response(self, *args: Any, **kwargs: Any) -> Response:
        """`dumps` as a response, without decoding the bytes in between."""
        body = orjson.dumps(self._prepare_response_obj(args, kwargs))
        return Response(body, mimetype="application/json")

    def loads(self, s: str | bytes, **_kwargs: Any) -> Any:
        return orjson.loads(s)


class ModelName(PathConverter):
    """A model's name in a path, as in org/model; what may be done with one is no part of it."""

    regex = r"[^/].*?(?<!/pause)(?<!/resume)"


def create_app(bind: str) -> OpenAPI:
    """Builds the app, which is served on HOST:PORT, and starts what runs beside its requests."""
    app = OpenAPI(
        __name__,
        info=Info(title="Sluice", version=version("sluice"), description=document.DESCRIPTION),
        doc_prefix="/docs",
        validation_error_callback=errors.refuse_parameters,
    )
    app.json = Json(app)
    app.url_map.converters["model"] = ModelName
    logs.configure(get_settings())
    tracing.get_tracer(traces.PART)
    gevent.get_hub().print_exception = _log_lost  # type: ignore[assignment,method-assign]
    services = Services.start(may_be_open=is_loopback(bind.rpartition(":")[0]))
    # Otherwise /docs would first ask which page it shall show.
    app.config["OPENAPI_HTML_STRING"] = "{% include 'docs.html' %}"
    app.config["MAX_CONTENT_LENGTH"] = services.settings.max_body_bytes
    app.extensions["sluice"] = services
    app.register_api(routes.blueprint)
    app.register_api(jobs.blueprint)
    app.register_api(health.blueprint)
    app.register_api(metrics.blueprint)
    app.register_api(admin.blueprint)
    app.register_api(key_routes.blueprint)
    app.register_api(model_routes.blueprint)
    app.register_api(usage.blueprint)
    document.complete(app.api_doc)
    app.add_url_rule("/openapi.json", view_func=lambda: app.api_doc)
    # Their checks come in this order: what is refused is counted too.
    instruments.register(app)
    sites.register(app, services.settings)
    access.register(app, services.keyring)
    websocket.register(app)
    access.check_table(app.url_map)
    app.after_request(_add_request_id)
    app.after_request(told.add_headers)
    errors.register(app)
    # What is there now stays: a full collection over it would hold up every stream for 50 ms.
    gc.collect()
    gc.freeze()
    return app


def _log_lost(context: object, _kind: object, error: object, _traceback: object) -> None:
    """Has what ends a greenlet logged; gevent itself would write it out, and wait for that."""
    thrown = error if isinstance(error, BaseException) else None
    log.error("%s ended", type(context).__name__, exc_info=thrown)


def _add_request_id(response: Response) -> Response:
    """Gives back the client's request id, or the job's."""
    own = request.headers.get("x-request-id", "")[:128] or response.headers.get("x-sluice-job")
    if own:
        response.headers["x-request-id"] = own
    return response
