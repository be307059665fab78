"""Keys and tenants: who gets in, what they may use, and that none sees what is another's."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
import requests
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from api.access import KEY_PROTOCOL, SOCKET, WHO
from bench.stack import Stack, await_that, running, slack
from db import keys as records
from db import migrate
from tasks.contract.access import KeySpec, Role, TenantSpec
from tasks.maintenance import api_keys
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, LONG, call

REVOKED_WITHIN_S = 5.0
OTHER = {"name": "other", "engine": "sim"}
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("keys"), [SIM, OTHER], keep_alive_s=1)
    migrate(stack.database_url)
    for tenant in ("acme", "umbrella"):
        api_keys.set_tenant(stack.database_url, tenant, TenantSpec())
    api_keys.create(stack.database_url, KeySpec(name="first", tenant="acme"))
    with running(stack) as stack:
        yield stack


@pytest.fixture(scope="module")
def make(stack: Stack) -> Make:
    def make(**terms: Any) -> dict[str, Any]:
        spec = KeySpec.model_validate({"name": "test", "tenant": "acme"} | terms)
        return api_keys.create(stack.database_url, spec)

    return make


def ask(stack: Stack, key: str | None, method: str, path: str, **options: Any) -> requests.Response:
    headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {key}"} if key else {})
    return call(stack, method, path, headers=headers, **options)


def client(stack: Stack, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0)


def submit(stack: Stack, key: str, **terms: Any) -> requests.Response:
    headers = terms.pop("headers", {})
    job = {"endpoint": ENDPOINT, "body": CHAT} | terms
    return ask(stack, key, "POST", "/v1/jobs", json=job, headers=headers)


def code(answer: requests.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_the_sdk_gets_in_with_a_key_only(stack: Stack, make: Make) -> None:
    with client(stack, make()["key"]) as known:
        assert [model.id for model in known.models.list()] == ["sim", "gpt-3.5-turbo", "other"]
    with client(stack, "sk-wrong") as unknown, pytest.raises(openai.AuthenticationError):
        unknown.models.list()
    with (
        client(stack, make(models=["other"])["key"]) as narrow,
        pytest.raises(openai.PermissionDeniedError, match="not for the model sim"),
    ):
        narrow.chat.completions.create(model="sim", messages=[{"role": "user", "content": "Hi"}])


def test_all_that_is_no_valid_key_is_refused_alike(stack: Stack, make: Make) -> None:
    revoked = make()
    api_keys.revoke(stack.database_url, revoked["id"])
    dead = make(expires_at=int(time.time()) + 10)
    assert ask(stack, dead["key"], "GET", "/v1/models").ok
    await_that(lambda: not ask(stack, dead["key"], "GET", "/v1/models").ok, 10 + slack(1))
    shown = [None, "", "x", "sk-wrong", dead["key"], revoked["key"], revoked["key"][:-1]]
    answers = [ask(stack, key, "GET", "/v1/models") for key in shown]
    answers.append(call(stack, "GET", "/v1/models", headers={"Authorization": "Basic eDp5"}))
    assert {code(answer) for answer in answers} == {(401, "invalid_api_key")}
    assert len({answer.text for answer in answers}) == 1
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}


def test_a_key_is_for_its_models_and_endpoints(stack: Stack, make: Make) -> None:
    key = make(models=["gpt-3.5-turbo"], endpoints=["/v1/completions"])["key"]
    models = ask(stack, key, "GET", "/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["sim", "gpt-3.5-turbo"]
    assert code(ask(stack, key, "GET", "/v1/models/other")) == (403, "model_not_allowed")
    assert code(submit(stack, key)) == (403, "endpoint_not_allowed")
    text = {"prompt": "Once", "max_tokens": 2}
    assert ask(stack, key, "POST", "/v1/completions", json=text).ok
    wrong = ask(stack, key, "POST", "/v1/completions", json=text | {"model": "other"})
    assert code(wrong) == (403, "model_not_allowed")
    unknown = ask(stack, key, "POST", "/v1/completions", json=text | {"model": "no"}).json()
    assert "other" not in unknown["error"]["message"]


@pytest.mark.parametrize("role", [None, *Role])
def test_each_route_takes_its_role(stack: Stack, make: Make, role: Role | None) -> None:
    key = make(roles=[role])["key"] if role else None
    for row, needed in WHO.items():
        method, rule = row.split()
        if method == SOCKET:
            continue
        path = rule.replace("path:", "").replace("string:", "").replace("<", "no-").replace(">", "")
        status = ask(stack, key, method, path, json={}).status_code
        if needed is None or role in (needed, Role.ADMIN):
            assert status not in (401, 403), row
        else:
            assert status == (403 if role else 401), row


def test_another_tenants_jobs_are_not_there(stack: Stack, make: Make) -> None:
    ours, theirs = make()["key"], make(tenant="umbrella")["key"]
    once = {"Idempotency-Key": "the same"}
    job_id = submit(stack, ours, headers=once).json()["id"]
    mine = submit(stack, theirs, headers=once | {"X-Tenant": "acme"}).json()["id"]
    assert mine != job_id
    listed = ask(stack, theirs, "GET", "/v1/jobs").json()["data"]
    assert [job["id"] for job in listed] == [mine]
    for method, path in (
        *(("GET", f"/v1/jobs/{job_id}{rest}") for rest in ("", "/events", "/webhook")),
        *(("POST", f"/v1/jobs/{job_id}/{what}") for what in ("cancel", "retry")),
        ("GET", f"/v1/jobs?after={job_id}"),
    ):
        assert code(ask(stack, theirs, method, path)) == (404, "job_not_found"), path
    begun_s = time.monotonic()
    waited = ask(stack, theirs, "GET", f"/v1/jobs/{job_id}", headers={"Prefer": "wait=20"})
    assert (waited.status_code, time.monotonic() - begun_s < 10) == (404, True)
    assert ask(stack, ours, "GET", f"/v1/jobs/{job_id}").ok


def test_a_revocation_ends_open_streams(stack: Stack, make: Make) -> None:
    key, watcher = make(), make()
    job_id = submit(stack, key["key"], body=LONG).json()["id"]
    headers = {"Authorization": f"Bearer {key['key']}"}
    chat = requests.post(stack.url + ENDPOINT, json=LONG, headers=headers, stream=True, timeout=60)
    url = f"{stack.url}/v1/jobs/{job_id}/events"
    follower = requests.get(url, headers=headers, stream=True, timeout=60)
    with connect(f"ws{stack.url[4:]}{ENDPOINT}", additional_headers=headers) as idle:
        begun_s = time.monotonic()
        api_keys.revoke(stack.database_url, key["id"])
        assert orjson.loads(idle.recv(timeout=20))["error"]["code"] == "invalid_api_key"
        assert idle.recv(timeout=20) == "[DONE]"
        with pytest.raises(ConnectionClosed):
            idle.recv(timeout=20)
        assert idle.close_code == 1008
    for answer in (chat, follower):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"code":"invalid_api_key"' in answer.text[-400:]
    took_s = time.monotonic() - begun_s
    assert took_s < slack(REVOKED_WITHIN_S)
    left = f"/v1/jobs/{chat.headers['x-sluice-job']}"
    # The client has its last byte before its job is let go.
    await_that(lambda: ask(stack, watcher["key"], "GET", left).json()["status"] == "cancelled")


def test_an_open_socket_may_what_its_key_may_by_now(stack: Stack, make: Make) -> None:
    key = make()
    headers = {"Authorization": f"Bearer {key['key']}"}
    body = orjson.dumps(CHAT | {"max_tokens": 1})
    with connect(f"ws{stack.url[4:]}{ENDPOINT}", additional_headers=headers) as socket:

        def answer() -> str:
            socket.send(body)
            found = ""
            while (message := str(socket.recv(timeout=20))) != "[DONE]":
                found += message
            return found

        assert "choices" in answer()
        spec = KeySpec(name="narrow", tenant=key["tenant"], models=["another"])
        api_keys.change(stack.database_url, key["id"], spec)
        await_that(lambda: "model_not_allowed" in answer(), slack(REVOKED_WITHIN_S))


def test_a_revoked_key_stays_so_when_it_is_changed(database_url: str) -> None:
    migrate(database_url)
    made = api_keys.create(database_url, KeySpec(name="x"))
    api_keys.rotate(database_url, made["id"], 60)
    api_keys.revoke(database_url, made["id"])
    changed = api_keys.change(database_url, made["id"], KeySpec(name="y"))
    assert (changed["name"], changed["is_enabled"], changed["old_secret_until"]) == (
        "y",
        False,
        None,
    )
    api_keys.set_tenant(database_url, "t", TenantSpec(is_enabled=False))
    assert api_keys.set_tenant(database_url, "t", TenantSpec(weight=2))["is_enabled"] is False
    assert api_keys.set_tenant(database_url, "t", TenantSpec(is_enabled=True))["is_enabled"]


def test_a_browser_shows_its_key_as_a_subprotocol(stack: Stack, make: Make) -> None:
    url, key = f"ws{stack.url[4:]}{ENDPOINT}", KEY_PROTOCOL + make()["key"]
    for offered, chosen in (([key], key), ([key, "sluice"], "sluice"), (["realtime", key],) * 2):
        with connect(url, subprotocols=offered) as socket:  # type: ignore[arg-type]
            assert socket.subprotocol == (chosen if isinstance(chosen, str) else "realtime")
    with pytest.raises(InvalidStatus) as refused:
        connect(url, subprotocols=[KEY_PROTOCOL + "sk-wrong"])  # type: ignore[list-item]
    assert refused.value.response.status_code == 401


def test_a_rotated_key_lives_on_for_its_overlap(stack: Stack, make: Make) -> None:
    old = make()
    new = api_keys.rotate(stack.database_url, old["id"], 8)
    assert ask(stack, old["key"], "GET", "/v1/models").ok
    assert ask(stack, new["key"], "GET", "/v1/models").ok
    await_that(lambda: not ask(stack, old["key"], "GET", "/v1/models").ok, 8 + slack(2))
    assert ask(stack, old["key"], "GET", "/v1/models").status_code == 401
    assert ask(stack, new["key"], "GET", "/v1/models").ok


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"roles": ["king"]}, "roles.0: Input should be 'user', 'operator' or 'admin'."),
        ({"weight": -1}, "weight: Input should be greater than or equal to 0.001."),
        ({"limits": {"queued_jobs": 0}}, "limits.queued_jobs: Input should be greater than"),
        ({"expires_at": 1}, "expires_at: Value error, is in the past."),
        ({"tenant": "nobody"}, "There is no tenant 'nobody'"),
    ],
)
def test_bad_values_are_one_sentence(
    stack: Stack, make: Make, terms: dict[str, Any], says: str
) -> None:
    admin, stored = make(roles=["admin"])["key"], records.page(stack.database_url, None, None, 999)
    refused = ask(stack, admin, "POST", "/v1/admin/keys", json={"name": "x"} | terms)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(says)
    assert len(records.page(stack.database_url, None, None, 999)) == len(stored)


def test_keys_are_kept_as_digests(database_url: str) -> None:
    migrate(database_url)
    made = api_keys.create(database_url, KeySpec(name="x", roles=[Role.ADMIN, Role.USER]))
    assert len(made["key"]) == 46
    assert made["key"].startswith(made["prefix"])
    key = records.get(database_url, made["id"])
    assert key
    assert made["key"] not in str(vars(key))
    digest = records.digest_of(made["key"])
    found = records.find(database_url, {digest, "other"})
    assert (found.keys[digest].roles, list(found.keys)) == (("user", "admin"), [digest])
    records.note_used(database_url, [key.id])
    assert api_keys.show(database_url, key.id)["last_used_at"]
    rotated = api_keys.rotate(database_url, key.id, 60)
    both = {digest, records.digest_of(rotated["key"])}
    assert records.find(database_url, both).keys.keys() == both
    api_keys.set_tenant(database_url, "default", TenantSpec(is_enabled=False))
    assert not any(key.is_enabled for key in records.find(database_url, both).keys.values())


def sluice(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(
        command,
        env={"SLUICE_HOME": str(home), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_commands_make_show_and_revoke(home: Path) -> None:
    made = sluice(home, "keys", "create", "me", "--limit", "queued_jobs=5", "--json")
    assert made.returncode == 0, made.stderr
    key = orjson.loads(made.stdout)
    shown = orjson.loads(sluice(home, "keys", "show", key["id"]).stdout)
    assert (shown["limits"], "key" in shown) == ({"queued_jobs": 5}, False)
    assert key["key"] not in sluice(home, "keys", "list").stdout
    assert "is revoked" in sluice(home, "keys", "revoke", key["id"]).stdout
    refused = sluice(home, "keys", "create", "me", "--weight", "-1")
    assert (refused.returncode, refused.stderr) == (
        2,
        "sluice: weight: Input should be greater than or equal to 0.001.\n",
    )


def test_other_machines_are_not_served_without_a_key(home: Path) -> None:
    refused = sluice(home, "api", "--bind", "0.0.0.0:1")
    assert refused.returncode == 2
    assert "make one with `sluice keys create NAME`" in refused.stderr.splitlines()[-1]
