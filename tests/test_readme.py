"""The examples of README, run as they stand, against the real engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.stack import Stack
from tasks.contract.settings import PREFIX, Settings

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```(python|sh)\n(.*?)```", README, re.DOTALL)

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(("language", "code"), EXAMPLES)
def test_an_example_works(vllm_stack: Stack, language: str, code: str) -> None:
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{vllm_stack.api_ports[0]}")
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout) > 10


def test_every_example_is_found() -> None:
    assert len(EXAMPLES) == 6


def test_the_table_names_every_setting() -> None:
    assert set(re.findall(r"^\| `(SLUICE_\w+)`", README, re.MULTILINE)) == {
        PREFIX + name.upper() for name in Settings.model_fields
    }
