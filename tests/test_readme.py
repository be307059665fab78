"""README and docs/: their examples, run as they stand, against the real engine; what they name."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench.stack import Stack
from tasks.contract.settings import FILE_VARIABLES, PREFIX, Settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("api", "bench", "db", "deploy", "docs", "gpu_worker", "tasks", "tests")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
EXAMPLES = [
    pytest.param(language, code, id=f"{page}-{language}")
    for page, text in PAGES.items()
    for language, code in re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL)
]
# It may name what is gone by now.
HISTORY = "CHANGELOG.md"

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(("language", "code"), EXAMPLES)
def test_an_example_works(vllm_stack: Stack, language: str, code: str) -> None:
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{vllm_stack.api_ports[0]}")
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout) > 10


def test_every_example_is_found() -> None:
    pages = Counter(str(example.id).rpartition("-")[0] for example in EXAMPLES)
    assert pages == {"README.md": 1, "docs/getting-started.md": 4, "docs/jobs.md": 2}


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_exists(page: str) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | FILE_VARIABLES
    assert set(re.findall(rf"\b{PREFIX}[A-Z_]+", PAGES[page])) <= known


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY])
def test_every_file_exists(page: str) -> None:
    paths = re.findall(rf"(?<![\w/.])(?:{'|'.join(PACKAGES)})/[\w./-]*\w", PAGES[page])
    assert [path for path in paths if not (ROOT / path).exists()] == []
    kept = {path.name for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert set(re.findall(r"(?<![\w/.*])[\w-]+\.py\b", PAGES[page])) <= kept


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", PAGES[page])
    for path, anchor in links:
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(PAGES[str(target.relative_to(ROOT))]), anchor


def anchors(text: str) -> set[str]:
    """Those that headings get where Markdown is shown."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
