"""What the demo model is taught exists: its texts name only what is built."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import requests

from bench.stack import Stack
from deploy.cli import main
from gpu_worker.demo.corpus import TOPIC_FILES
from gpu_worker.demo.texts import read
from tasks.contract.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("api", "bench", "db", "deploy", "docs", "gpu_worker", "tasks", "tests")
# What may follow the name of the program, or of make, where nothing is called.
PROSE = {*("mean", "is", "command", "program", "also", "have"), *("mistakes", "it", "a", "me")}
# Features that others have: a sentence may name one only as missing.
NOT_BUILT = re.compile(
    r"/v1/batches|/v1/files|batch API|batches|batch file|files API|kubernetes|KEDA|autoscal"
    r"|responses API|web console|fine-tun|grafana server|user interface|billing|single sign-on"
    r"|guardrail",
    re.IGNORECASE,
)
DENIAL = re.compile(r"\b(no|not|nothing|never|elsewhere)\b", re.IGNORECASE)


def strings(content: Any) -> Iterator[str]:
    """All strings of a document, names of fields left out."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            yield from strings(part)
    elif content is not None:
        yield str(content)


def topics() -> list[dict[str, Any]]:
    return [topic for name in (*TOPIC_FILES, "talk.yaml") for topic in read(name)]


def taught() -> list[str]:
    """All answers that the model is taught."""
    other = read("other.yaml")
    answers = [answer for topic in topics() for answer in topic["say"]]
    return [*answers, *other["fallback"], other["more"]["none"], *other["plain"]]


TEXTS = [*strings(topics()), *taught()]


def named(pattern: str, texts: Iterable[str] = ()) -> set[str]:
    """What the pattern finds in the texts; its group, if it has one."""
    return {name for text in texts or TEXTS for name in re.findall(pattern, text)}


def commands(group: click.Group, before: str = "") -> Iterator[str]:
    for name, command in members(group).items():
        yield before + name
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")


def members(group: click.Group) -> dict[str, click.Command]:
    """Its commands, those included that are loaded when they are needed."""
    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in found.items() if command}


def options(group: click.Group) -> Iterator[str]:
    for parameter in group.params:
        yield from parameter.opts
    for command in members(group).values():
        if isinstance(command, click.Group):
            yield from options(command)
        else:
            yield from (name for parameter in command.params for name in parameter.opts)


def test_every_command_exists() -> None:
    known = set(commands(main))
    groups = "|".join(name for name, one in members(main).items() if isinstance(one, click.Group))
    found = named(r"(?<![\w./-])sluice ([a-z]+)") - PROSE
    assert {"submit", "watch", "job"} <= found
    assert not found - known
    assert not named(rf"\bsluice ((?:{groups}) [a-z]+)") - known


def test_every_option_exists() -> None:
    assert not named(r"(?<!\S)(--[a-z][a-z-]*)") - set(options(main))


def test_every_target_of_make_exists() -> None:
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = named(r"\bmake ([a-z]+)") - PROSE
    assert {"up", "test"} <= found
    assert not found - known


def test_every_setting_exists() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert not named(r"\b(SLUICE_\w*)") - known - {PREFIX}


def test_every_route_exists(sim_stack: Stack) -> None:
    document = requests.get(f"{sim_stack.url}/docs/openapi.json", timeout=10).json()["paths"]
    routes = {re.sub("{.*?}", "{}", path): set(methods) for path, methods in document.items()}
    found = named(r"(?:\b(GET|POST|DELETE) )?(?<![\w.~/=])(/[a-z][\w/{}.-]*[\w}])")
    assert ("POST", "/v1/jobs/{id}/cancel") in found
    for method, path in found:
        route = re.sub("{.*?}", "{}", path)
        if method:
            assert method.lower() in routes.get(route, ()), f"{method} {path}"
        elif not route.startswith("/docs"):
            assert any(f"{known}/".startswith(f"{route}/") for known in routes), path


def test_every_header_is_sent(sim_stack: Stack) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    answer = requests.post(f"{sim_stack.url}/v1/chat/completions", json=body, timeout=20)
    assert not named(r"(?<!\S)(x-[a-z]+-[a-z-]+)") - {name.lower() for name in answer.headers}


def test_every_metric_exists() -> None:
    known = named(r"`(sluice_\w+)`", [(ROOT / "docs/metrics.md").read_text()])
    assert not named(r"\b(sluice_\w*)") - known - {"sluice_"}


def test_every_file_exists() -> None:
    inside = named(rf"(?<![\w/.])((?:{'|'.join(PACKAGES)})/[\w./-]*\w)")
    assert "gpu_worker/demo/train.py" in inside
    assert [path for path in inside if not (ROOT / path).exists()] == []
    names = named(r"(?<![\w/.])([\w-]+\.(?:md|py|ya?ml|json|toml))\b")
    kept = {path.name for package in PACKAGES for path in (ROOT / package).rglob("*.*")}
    assert [name for name in names - kept if not (ROOT / name).exists()] == []


def boasts(text: str) -> list[str]:
    """Its sentences that present what is not built as if it existed."""
    sentences = re.split(r"(?<=[.!?])\s", text)
    return [one for one in sentences if NOT_BUILT.search(one) and not DENIAL.search(one)]


@pytest.mark.parametrize("text", taught())
def test_what_is_not_built_is_declared_missing(text: str) -> None:
    assert boasts(text) == []
