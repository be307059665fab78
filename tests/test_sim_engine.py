"""The sim engine as its users meet it: through OpenAI's SDK, and as the worker drives it."""

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest

from gpu_worker.engines.engine import Engine, Load, Message
from gpu_worker.engines.sim import open_engine
from tasks.contract.errors import ConfigurationError
from tasks.contract.models import Model

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello there"}]}
FAST = {"first-token-s": 0, "tokens-per-s": 0}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def sim(**args: Any) -> Any:
    named = {name.replace("_", "-"): value for name, value in args.items()}
    return open_engine(Model(name="sim", engine="sim", aliases=("demo",), args=FAST | named))


async def post(engine: Engine, body: Any, path: str = CHAT, id: str = "R1") -> httpx.Response:  # noqa: A002
    transport = httpx.ASGITransport(engine.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://sim") as client:
        return await client.post(path, json=body, headers={"x-request-id": id})


class Request:
    """A request driven as the worker drives it: cancelled when nobody wants it any more."""

    def __init__(self, engine: Engine, body: dict[str, Any]) -> None:
        self.sent: asyncio.Queue[Message] = asyncio.Queue()
        self._body: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]
        self.left = asyncio.Event()
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        self.task = asyncio.ensure_future(engine.app(scope, self._receive, self.sent.put))

    async def _receive(self) -> Message:
        if self._body:
            return self._body.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def next(self) -> Message:
        return await asyncio.wait_for(self.sent.get(), 30)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])
@pytest.mark.parametrize("speed", [25, 40, 70, 200])
async def test_tokens_come_at_the_set_speed(speed: int) -> None:
    async with sim(tokens_per_s=speed, length=speed // 2) as engine:
        begun_s = time.monotonic()
        await post(engine, HELLO)
        assert time.monotonic() - begun_s > 0.4


async def test_the_sdk_streams_a_chat_to_its_usage() -> None:
    async with sim() as engine:
        transport = httpx.ASGITransport(engine.app)
        http = httpx.AsyncClient(transport=transport)
        client = openai.AsyncOpenAI(base_url="http://sim/v1", api_key="-", http_client=http)  # type: ignore[arg-type]
        stream = await client.chat.completions.create(
            model="demo", max_tokens=5, stream=True, stream_options={"include_usage": True}, **HELLO
        )
        chunks = [chunk async for chunk in stream]
        whole = await client.chat.completions.create(model="sim", max_tokens=5, **HELLO)
        text = await client.completions.create(model="sim", prompt=["a", "b"], n=2, max_tokens=3)
        await client.close()
    assert chunks[0].choices[0].delta.role == "assistant"
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert content == whole.choices[0].message.content
    assert len(content.split()) == 5
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
    assert text.usage is not None
    assert text.usage.completion_tokens == 12


async def test_the_same_request_gets_the_same_text_and_another_seed_another() -> None:
    async with sim(length=20) as engine:
        answers = [await post(engine, HELLO | {"seed": seed}) for seed in (1, 1, 2)]
    first, again, other = (answer.json()["choices"][0] for answer in answers)
    assert first == again != other
    assert first["finish_reason"] == "stop"
    assert answers[0].json()["id"] == "chatcmpl-R1"


async def test_streams_are_framed_as_vllm_frames_them() -> None:
    async with sim() as engine:
        answer = await post(engine, HELLO | {"stream": True, "max_tokens": 1})
    role, last, done = answer.text.removesuffix("\n\n").split("\n\n")
    created = json.loads(role[6:])["created"]
    head = f'"id":"chatcmpl-R1","object":"chat.completion.chunk","created":{created},"model":"sim"'
    assert role == (
        f'data: {{{head},"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},'
        '"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}'
    )
    assert '"finish_reason":"length","stop_reason":null,"token_ids":null}],"system_' in last
    assert done == "data: [DONE]"
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, HELLO | {"max_tokens": 0}, "max_tokens"),
        (CHAT, HELLO | {"n": 0}, "n"),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 100_000}, "n"),
        (CHAT, [], None),
        ("/v1/completions", {"prompt": []}, "prompt"),
    ],
)
async def test_a_malformed_request_is_refused_in_openais_shape(
    path: str, body: Any, param: str | None
) -> None:
    async with sim() as engine:
        answer = await post(engine, body, path)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.pop("message").startswith(f"The request is malformed: {param or 'body'}: ")
    assert error == {"type": "invalid_request_error", "param": param, "code": "invalid_request"}


async def test_embeddings_are_no_route_of_a_text_model() -> None:
    async with sim() as engine:
        answer = await post(engine, {"input": "x"}, path="/v1/embeddings")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})


@pytest.mark.parametrize("leave", ["cancel", "disconnect"])
async def test_a_client_that_leaves_frees_its_place_for_the_next(leave: str) -> None:
    async with sim(tokens_per_s=100, length=10_000, max_num_seqs=1) as engine:
        first = Request(engine, HELLO | {"stream": True})
        for _ in range(3):
            await first.next()
        second = Request(engine, HELLO | {"max_tokens": 1})
        async with asyncio.timeout(30):
            while engine.load() != Load(running=1, waiting=1):  # noqa: ASYNC110 (in this loop)
                await asyncio.sleep(0.005)
        if leave == "cancel":
            first.task.cancel()
        first.left.set()
        assert (await second.next())["status"] == 200
        await asyncio.wait([first.task, second.task])
        assert engine.load() == Load(running=0, waiting=0)


async def test_an_error_is_a_500_for_the_share_that_was_set() -> None:
    async with sim(failure="error", failure_rate=0.5, length=1) as engine:
        ids = [str(number) for number in range(40)]
        first = [(await post(engine, HELLO, id=each)).status_code for each in ids]
        again = [(await post(engine, HELLO, id=each)).status_code for each in ids]
        spared = await post(engine, HELLO | {"sim": {"failure": "none"}})
    assert first == again
    assert 8 < first.count(500) < 32
    assert spared.status_code == 200


async def test_one_poisoned_request_hangs_after_its_first_token_and_others_go_on() -> None:
    async with sim() as engine:
        stuck = Request(engine, HELLO | {"stream": True, "sim": {"failure": "hang"}})
        for _ in range(3):  # the head, the role, the first token
            await stuck.next()
        assert (await post(engine, HELLO)).status_code == 200
        assert stuck.sent.empty()
        assert engine.load().running == 1
        stuck.task.cancel()


async def test_a_dying_engine_ends_every_stream_with_its_error() -> None:
    async with sim(tokens_per_s=200) as engine:
        fatal = HELLO | {"stream": True, "sim": {"failure": "die"}}
        answers = await asyncio.gather(
            post(engine, fatal), post(engine, HELLO | {"stream": True, "max_tokens": 10_000})
        )
        late = await post(engine, HELLO)
    assert engine.is_dead()
    assert late.status_code == 500
    for answer in answers:
        *_, error, done = answer.text.removesuffix("\n\n").split("\n\n")
        assert json.loads(error[6:]) == late.json()
        assert done == "data: [DONE]"


@pytest.mark.parametrize("args", [{"speed": 3}, {"failure": "sometimes"}, {"tokens-per-s": -1}])
async def test_a_wrong_argument_is_named(args: dict[str, Any]) -> None:
    name = next(iter(args)).replace("-", "_")
    with pytest.raises(ConfigurationError, match=f"args of sim: {name}"):
        async with sim(**args):
            pass
