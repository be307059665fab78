"""The API's own description: valid, true of what the API sends, and shown under /docs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import requests
from openapi_spec_validator import validate

from tests.conftest import SIM
from tests.stack import Stack, running

HERE = Path(__file__).parent
FAST = SIM | {"args": {"tokens-per-s": 0, "first-token-s": 0, "length": 10}}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("openapi")
    with running(Stack(home, [FAST], admin_key="admin", keep_alive_s=1)) as stack:
        yield stack


@pytest.fixture(scope="module")
def document(stack: Stack) -> dict[str, Any]:
    return dict(requests.get(f"{stack.url}/openapi.json", timeout=10).json())


def test_the_document_is_valid_at_both_addresses(stack: Stack, document: dict[str, Any]) -> None:
    validate(document)
    assert requests.get(f"{stack.url}/docs/openapi.json", timeout=10).json() == document


def test_the_api_does_what_its_document_says(stack: Stack) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", HERE / "schemathesis.toml"]
    command += ["run", f"{stack.url}/openapi.json", "--no-color"]
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        *(command,),
        env=os.environ | {"PYTHONPATH": path, "NO_COLOR": "1"},
        cwd=stack.home,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr
