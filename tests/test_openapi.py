"""The API's own description: valid, true of what the API sends, and shown under /docs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import requests
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from bench.stack import Stack, running
from db import writing
from db.models import JobEvent, JobRecord
from tasks.contract.job import Lane, State
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, call, submit, wait

pytestmark = pytest.mark.timeout(1200)
HERE = Path(__file__).parent
FAST = SIM | {"args": {"tokens-per-s": 0, "first-token-s": 0, "length": 10}}
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("openapi")
    settings = {"admin_key": "admin", "keep_alive_s": 1}
    with running(Stack(home, [FAST], **settings)) as stack:
        yield stack


@pytest.fixture(scope="module")
def document(stack: Stack) -> dict[str, Any]:
    return dict(call(stack, "GET", "/openapi.json").json())


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def test_the_document_is_valid_at_both_addresses(stack: Stack, document: dict[str, Any]) -> None:
    validate(document)
    assert call(stack, "GET", "/docs/openapi.json").json() == document


def test_it_has_no_nulls(document: dict[str, Any]) -> None:
    def nulls(value: Any, at: str) -> Iterator[str]:
        if value is None:
            yield at
        if isinstance(value, (dict, list)):
            members = value.items() if isinstance(value, dict) else enumerate(value)
            for name, member in members:
                yield from nulls(member, f"{at}/{name}")

    assert not list(nulls(document, "#"))


def test_every_operation_documents_its_errors_in_the_one_shape(document: dict[str, Any]) -> None:
    shape = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for _, path, operation in operations(document):
        responses = operation["responses"]
        refused = {status: each for status, each in responses.items() if status >= "400"}
        assert refused.keys() >= {"403", "500", "503"}, path
        assert all(each["content"] == shape for each in refused.values()), path
        assert {"Retry-After", "retry-after-ms"} <= responses["503"]["headers"].keys()
        if path.startswith("/v1/admin/"):
            assert operation["security"] == [{"bearer": []}]
            assert "WWW-Authenticate" in responses["401"]["headers"]


def test_its_examples_run(sim_stack: Stack) -> None:
    try_examples(sim_stack)


def try_examples(stack: Stack) -> None:
    """Fails unless the deployment takes every example of its document."""
    document = call(stack, "GET", "/openapi.json").json()
    tried = 0
    for method, path, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            answer = call(stack, method, path, json=example["value"])
            # No model for chats embeds.
            assert answer.status_code == 404 if path.endswith("embeddings") else answer.ok
            tried += 1
    assert tried >= 6


def test_docs_open_on_the_operations(stack: Stack) -> None:
    page = call(stack, "GET", "/docs")
    assert page.ok
    assert "<title>Sluice API</title>" in page.text
    assert 'url: "openapi.json"' in page.text
    parts = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.text)
    assert len(parts) == 2
    for part in parts:
        assert requests.get(urljoin(page.url, part), timeout=10).ok, part


def conform(document: dict[str, Any], name: str, given: Any) -> None:
    """Fails if that is no such object, or has a field that is not in the document."""
    reference = {"$ref": f"#/components/schemas/{name}", "unevaluatedProperties": False}
    Draft202012Validator(reference | {"components": document["components"]}).validate(given)


def test_jobs_of_every_end_are_as_documented(sim_stack: Stack, document: dict[str, Any]) -> None:
    bodies = {
        "completed": CHAT,
        "failed": CHAT | {"max_tokens": -1},
        "cancelled": CHAT | {"sim": {"failure": "hang"}, "stream": True},
    }
    for status, body in bodies.items():
        job = submit(sim_stack, body, metadata={"a": "b"})
        conform(document, "Job", job)
        if status == "cancelled":
            call(sim_stack, "POST", f"/v1/jobs/{job['id']}/cancel")
        ended = wait(sim_stack, job["id"]).json()
        assert ended["status"] == status
        conform(document, "Job", ended)
    conform(document, "JobList", call(sim_stack, "GET", "/v1/jobs").json())


def test_dead_letters_are_as_documented(stack: Stack, document: dict[str, Any]) -> None:
    at = datetime.now(UTC)
    dead = JobRecord(
        id="job_dead",
        tenant="default",
        model="sim",
        endpoint=ENDPOINT,
        lane=Lane.BATCH,
        created_at=at,
        status=State.FAILED,
        request=b"{}",
        completed_at=at,
        died_at=at,
    )
    reason = JobEvent(
        job_id=dead.id,
        record_id="1",
        at=at,
        state=State.FAILED,
        attempt=1,
        worker="worker",
        reason="it died",
    )
    with writing(f"sqlite:///{stack.home / 'sluice.db'}") as session:
        session.add(dead)
        session.flush()
        session.add(reason)

    def ask(method: str, path: str = "") -> requests.Response:
        return call(stack, method, f"/v1/admin/dead{path}", headers=ADMIN)

    conform(document, "DeadLetterWithReasons", ask("GET", "/job_dead").json())
    letters = ask("GET").json()
    assert letters["data"]
    conform(document, "DeadLetterList", letters)
    again = ask("POST", "/job_dead/retry")
    conform(document, "NewJob", again.json())
    assert again.headers["location"] == f"/v1/jobs/{again.json()['id']}"
    assert ask("DELETE", "/job_dead").status_code == 404


# The operator's part last: it ends with a model that is paused, and a worker that drains.
@pytest.mark.parametrize("part", ["--exclude-tag", "--include-tag"])
def test_the_api_does_what_its_document_says(stack: Stack, part: str) -> None:
    program = [sys.executable, "-m", "schemathesis.cli"]
    options = ["--config-file", str(HERE / "schemathesis.toml"), "run", "--no-color", part, "Admin"]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*program, *options, f"{stack.url}/openapi.json"],
        env=os.environ | {"PYTHONPATH": path},
        cwd=stack.home,
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert call(stack, "GET", "/health/live").ok
