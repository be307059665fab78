"""The lines that requests leave which fail unforeseen: their routes, and nothing of their own."""

import os
import subprocess
import sys
from pathlib import Path

import orjson

SECRET = "sk-marked-secret"
LOG = """
import logging, sys
from tasks.contract import logs
from tasks.contract.settings import Settings
logs.configure(Settings(log_format="json"))
secret = sys.argv[1]
def broken(*_, **__):
    raise RuntimeError("broken")
"""
FLASK = """
from flask import Flask
from api import errors
early, routed, late = Flask("early"), Flask("routed"), Flask("late")
early.before_request(lambda: 1 / 0)
late.after_request(broken)
for app, view in (early, dict), (routed, broken), (late, lambda **_: {}):
    errors.register(app)
    app.add_url_rule("/v1/jobs/<job_id>", view_func=view, endpoint="job")
early.test_client().open(f"/{secret}?{secret}", method=secret)
for app in routed, late:
    assert app.test_client().get(f"/v1/jobs/{secret}?{secret}").status_code == 500
"""
GUNICORN = """
from gunicorn.http.errors import InvalidHeader
from api.gunicorn_worker import leave_out_request
log = logging.getLogger("gunicorn.error")
log.addFilter(leave_out_request)
for error in RuntimeError("broken"), InvalidHeader(secret):
    try:
        raise error
    except Exception:
        log.exception("Error handling request %s %s", "GET", f"/{secret}?{secret}")
"""


def logged(script: str, directory: Path) -> list[str]:
    """The events that a program logs to which a secret is given; it is in none of them."""
    done = subprocess.run(
        [sys.executable, "-c", LOG + script, SECRET],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stderr.lower()
    return [orjson.loads(line)["event"] for line in done.stderr.splitlines()]


def test_what_fails_in_a_route_is_named_by_it(tmp_path: Path) -> None:
    route = "GET /v1/jobs/<job_id>"
    expected = ["no route failed", f"{route} failed", f"{route}: its answer failed"]
    assert logged(FLASK, tmp_path)[:3] == expected


def test_what_fails_in_gunicorn_is_not_named(tmp_path: Path) -> None:
    failed = "Error handling request"
    assert logged(GUNICORN, tmp_path) == [failed, f"{failed}: InvalidHeader"]
