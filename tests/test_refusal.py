"""What engines refuse reaches clients in the shape of OpenAI's errors."""

import json
from typing import Any

import pytest

from gpu_worker.refusal import in_our_shape
from tasks.contract.events import Start
from tasks.contract.job import Job

JOB = Job.create(model="m", endpoint="/v1/embeddings", body=b"{}")
JSON = [("content-type", "application/json"), ("content-length", "7"), ("retry-after", "3")]
WHOLE = {"message": "No.", "type": "BadRequestError", "param": "n", "code": 400}


def refuse(status: int, body: bytes, headers: list[tuple[str, str]] = JSON) -> tuple[Start, bytes]:
    return in_our_shape(Start(status, headers, 0, 1), body, JOB)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, {"detail": "Not Found"}, {"code": "endpoint_not_supported", "param": "model"}),
        (404, "", {"code": "endpoint_not_supported", "type": "not_found_error"}),
        (404, {"detail": "No such LoRA"}, {"code": "not_found", "message": "No such LoRA"}),
        (400, {"error": "model runner has stopped"}, {"message": "model runner has stopped"}),
        (400, {"object": "error", "message": "Too long", "code": 40303}, {"message": "Too long"}),
        (400, {"error": {"message": "No.", "code": 7}}, {"message": "No.", "code": 7}),
        (401, {"error": "no key"}, {"type": "authentication_error", "code": "unauthorized"}),
        (422, {"detail": [{"loc": ["body"]}]}, {"message": "The engine of m answers 422."}),
        (429, "slow down", {"type": "rate_limit_error", "code": "too_many_requests"}),
        (501, "", {"type": "server_error", "code": "not_implemented"}),
        (529, "<html>", {"type": "server_error", "code": "529"}),
        (400, ["a", "list"], {"type": "invalid_request_error", "code": "bad_request"}),
    ],
)
def test_a_refusal_of_any_shape_is_an_error_of_openais(
    status: int, body: Any, error: dict[str, Any]
) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    head, answer = refuse(status, raw, [("content-type", "text/html"), ("retry-after", "3")])
    given = json.loads(answer)["error"]
    assert set(given) == {"message", "type", "param", "code"}
    assert given["message"]
    assert {name: given[name] for name in error} == error
    assert (head.status, head.content_type) == (status, "application/json")
    assert dict(head.headers)["retry-after"] == "3"


def test_one_that_is_in_that_shape_passes_unchanged() -> None:
    body = json.dumps({"error": WHOLE, "more": 1}, indent=3).encode()
    assert refuse(400, body) == (Start(400, JSON, 0, 1), body)
