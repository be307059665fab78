"""Models that come, change and go while Sluice runs."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from bench.stack import Stack, await_that, running
from tasks.contract.models import Catalog, Model
from tasks.queue.entries import fitting
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, call

ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(Stack(tmp_path_factory.mktemp("models"), [SIM], admin_key="admin")) as stack:
        yield stack


def ask(stack: Stack, method: str, path: str, **options: Any) -> Any:
    return call(stack, method, path, headers=ADMIN, **options)


def put(stack: Stack, name: str, **entry: Any) -> Any:
    return ask(stack, "PUT", f"/v1/admin/models/{name}", json={"engine": "sim"} | entry)


def names(stack: Stack) -> list[str]:
    return [model["id"] for model in ask(stack, "GET", "/v1/models").json()["data"]]


def test_a_model_is_added_served_changed_and_removed(stack: Stack) -> None:
    made = put(stack, "new", aliases=["other"], env={"TOKEN": "secret"})
    assert made.status_code == 200, made.text
    assert made.json()["env"] == ["TOKEN"]
    assert names(stack) == ["sim", "gpt-3.5-turbo", "new", "other"]
    stack.start_worker("new")
    served = ask(stack, "POST", ENDPOINT, json=CHAT | {"model": "other"})
    assert served.headers["x-sluice-model"] == "new"
    put(stack, "new", slots=3)
    assert ask(stack, "POST", ENDPOINT, json=CHAT | {"model": "other"}).status_code == 404
    entries = ask(stack, "GET", "/v1/admin/models").json()["data"]
    assert [(e["id"], e["slots"], e["is_in_file"]) for e in entries] == [
        ("sim", 64, True),
        ("new", 3, False),
    ]
    assert ask(stack, "DELETE", "/v1/admin/models/new").json()["deleted"] is True
    assert names(stack) == ["sim", "gpt-3.5-turbo"]
    assert ask(stack, "DELETE", "/v1/admin/models/new").status_code == 404


def test_all_processes_of_the_api_learn_of_it(stack: Stack) -> None:
    first = stack.api_ports[0]
    second = stack.start_api()
    try:
        put(stack, "soon")
        stack.api_ports = [stack.api_ports[-1]]
        await_that(lambda: names(stack)[-1] == "soon", 10)
        ask(stack, "DELETE", "/v1/admin/models/soon")
    finally:
        stack.api_ports = [first]
        second.stop()
        await_that(lambda: names(stack) == ["sim", "gpt-3.5-turbo"], 10)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"slots": 0}, "slots"),
        ({"engine": "gpt"}, "engine"),
        ({"colour": "red"}, "colour"),
        ({"aliases": ["sim"]}, "sim"),
        (
            {"batch_invariant": True},
            "batch_invariant: only vLLM can do this, and the engine is sim",
        ),
        ({"fallbacks": ["nobody"]}, "nobody"),
    ],
)
def test_a_wrong_entry_is_one_sentence_and_stored_nowhere(
    stack: Stack, entry: dict[str, Any], why: str
) -> None:
    refused = put(stack, "wrong", **entry)
    assert refused.status_code == 400
    assert why in refused.json()["error"]["message"]
    assert "wrong" not in names(stack)


def test_an_entry_that_fits_no_more_is_left_out_and_the_others_stay() -> None:
    entries = {
        "first": {"engine": "sim", "aliases": ["new"], "fallbacks": ["second"]},
        "second": {"engine": "sim"},
        "gone": None,
        "third": {"engine": "sim", "aliases": ["new"]},
    }
    seed = Catalog([Model(name="sim", engine="sim"), Model(name="gone", engine="sim")])
    fit = fitting(seed, entries)
    assert set(fit) == {"first", "second", "gone"}
    assert [model.name for model in seed.changed(fit).models] == ["sim", "second", "first"]


def test_a_worker_of_no_model_serves_none_that_a_wildcard_leads_to(stack: Stack) -> None:
    put(stack, "wide", aliases=["typo-*"])
    worker = stack.start_worker("typo-1")
    assert worker.popen.wait(30) == 2
    assert "typo-1" in worker.log.read_text()
    ask(stack, "DELETE", "/v1/admin/models/wide")


def test_the_only_model_stays(stack: Stack) -> None:
    assert ask(stack, "DELETE", "/v1/admin/models/sim").status_code == 409


def test_the_commands_do_the_same(stack: Stack) -> None:
    def run(*command: str, given: str = "") -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "deploy.cli", "models", *command]
        return subprocess.run(
            program, env=stack.env, input=given, capture_output=True, text=True, check=False
        )

    made = run("set", "typed", "-", given="engine: sim\nslots: 2\n")
    assert orjson.loads(made.stdout)["slots"] == 2
    assert "typed" in run("list").stdout
    await_that(lambda: names(stack)[-1] == "typed", 10)
    assert run("remove", "typed").stdout == "typed is removed\n"
    refused = run("set", "typed", "-", given="- a list")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
