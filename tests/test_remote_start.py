"""What a remote engine makes of its entry and its server when it is opened."""

import base64
import json
import logging
from collections.abc import AsyncIterator

import pytest

from deploy.redis_server import free_port
from tasks.contract.errors import ConfigurationError
from tests.test_remote_engine import Server, post, remote, serving

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


@pytest.fixture
def unused() -> int:
    return free_port()


def listing(*names: str) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode()


UNCHANGED = {name: name for name in ("far", "gpt", "other", "", None)}
OURS = ("far", "gpt", "", None)


# What the server lists, the entry's args, and under which names it is asked.
NAMED: dict[str, tuple[bytes, dict[str, str], dict[str | None, str]]] = {
    "one": (listing("llama"), {}, dict.fromkeys(OURS, "llama")),
    "one, twice": (listing("llama", "llama"), {}, dict.fromkeys(OURS, "llama")),
    "one, another said": (listing("llama"), {"model": "x"}, dict.fromkeys(UNCHANGED, "x")),
    "two, another said": (listing("a", "b"), {"model": "x"}, dict.fromkeys(UNCHANGED, "x")),
    "two, with ours": (listing("a", "far"), {}, dict.fromkeys(OURS, "far")),
    "two, with an alias": (listing("a", "gpt"), {}, dict.fromkeys(OURS, "gpt")),
    "both ours": (listing("gpt", "far"), {}, dict.fromkeys(OURS, "far") | {"gpt": "gpt"}),
    "tags": (listing("a:latest", "far:latest"), {}, dict.fromkeys(OURS, "far")),
    "none": (listing(), {}, {}),
    "no JSON": (b"[", {}, {}),
    "no object": (b"[1]", {}, {}),
    "no list": (b'{"data": null}', {}, {}),
    "no objects": (b'{"data": ["a", "b"]}', {}, {}),
    "no names": (b'{"data": [{"id": 1}]}', {}, {}),
    "empty names": (listing(""), {}, {}),
    "too deep": (b'{"data": ' + b"[" * 10_000, {}, {}),
}


@pytest.mark.parametrize("case", NAMED)
async def test_the_server_is_asked_by_a_name_that_it_knows(server: Server, case: str) -> None:
    server.models, args, changes = NAMED[case]
    async with remote(server.url, aliases=("gpt",), **args) as engine:
        for name in UNCHANGED:
            await post(engine, json.dumps({"model": name}).encode())
        await post(engine, b"{}")
    *asked, unnamed = [json.loads(body) for _, body in server.requests]
    wanted = UNCHANGED | changes
    assert {name: body["model"] for name, body in zip(UNCHANGED, asked, strict=True)} == wanted
    assert unnamed.get("model") == wanted[None]


async def test_of_several_models_one_must_be_named(server: Server) -> None:
    server.models = listing(*[f"m{number}" for number in range(12)])
    with pytest.raises(ConfigurationError) as refused:
        async with remote(server.url):
            pass
    assert str(refused.value) == (
        "the server of far has 12 models: 'm0', 'm1', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', 'm8', "
        "'m9', …; name one: `-- --model NAME` behind `sluice up`, "
        "SLUICE_MODEL_ARGS='--model NAME', or args.model in models.yaml"
    )


async def test_no_server_at_the_start_is_a_configuration_error(unused: int) -> None:
    url = f"http://127.0.0.1:{unused}"
    with pytest.raises(ConfigurationError, match=f"answers at {url} .*start it, or correct"):
        async with remote(url):
            pass


async def test_a_missing_key_names_its_variable(server: Server) -> None:
    with pytest.raises(ConfigurationError, match="NO_SUCH_KEY"):
        async with remote(server.url, **{"api-key-env": "NO_SUCH_KEY"}):
            pass


@pytest.mark.parametrize("key", ["s3cret\x07", "s3cr\x7fet", "s3cr\net", "s3crét", "s3cret\u200b"])
async def test_a_key_that_cannot_be_sent_is_not_shown(
    server: Server, key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAR_KEY", key)
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigurationError) as refused:
        async with remote(server.url, **{"api-key-env": "FAR_KEY"}):
            pass
    assert "FAR_KEY" in str(refused.value)
    assert "s3cr" not in str(refused.value) + caplog.text


@pytest.mark.parametrize("key", ["s3cret\n", " s3cret\r\n"])
async def test_white_space_around_a_key_is_none_of_it(
    server: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", key)
    async with remote(server.url, **{"api-key-env": "FAR_KEY"}) as engine:
        await post(engine)
    assert "authorization: bearer s3cret\r\n" in server.requests[0][0].lower()


@pytest.mark.parametrize(
    "address",
    [
        "me:s3cret@127.0.0.1:{unused}",
        "me:s3cret@127.0.0.1:{server}/nowhere",
        "me:s3/cret@127.0.0.1:{server}",  # this is no URL
        "me:s3@cret@127.0.0.1:{unused}",
    ],
)
async def test_a_sources_password_is_not_shown(
    server: Server, unused: int, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = server.url.rpartition(":")[2]
    source = "http://" + address.format(server=port, unused=unused)
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigurationError) as refused:
        async with remote(source):
            pass
    assert "127.0.0.1" in str(refused.value)
    for secret in ("s3", "cret"):
        assert secret not in str(refused.value) + caplog.text


async def test_a_sources_password_is_sent(server: Server) -> None:
    async with remote(server.url.replace("://", "://me:s3%20cret@")) as engine:
        await post(engine)
    expected = "Basic " + base64.b64encode(b"me:s3 cret").decode()
    assert f"authorization: {expected}\r\n".lower() in server.requests[0][0].lower()
