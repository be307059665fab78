"""What the sim engine reads and answers: the shapes, orders and nulls of vLLM 0.32.

A token is a word, and the same request always gets the same words.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import shake_256
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.contract.errors import InvalidRequestError

CONTEXT_TOKENS = 131_072  # all choices of a request share them
FINGERPRINT = "sluice-sim"
VOCABULARY = (
    "water river lake rain cloud stream gate lock canal mill wheel stone bridge bank boat sail "
    "wind wave tide shore sand reed heron trout otter willow moss fern path field meadow hill "
    "opens closes rises falls flows turns waits carries keeps holds gives takes meets follows "
    "slowly gently early late again below above beyond between under the a one and then with"
)
WORDS = VOCABULARY.split()

Failure = Literal["none", "error", "hang", "crash", "die"]
Json = dict[str, Any]


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = False


class SimOptions(BaseModel):
    """Options of a request for this engine itself, under `sim`."""

    model_config = ConfigDict(extra="forbid")

    failure: Failure


class Request(BaseModel):
    """What both endpoints read; other fields are accepted and change nothing."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(1, ge=1, le=CONTEXT_TOKENS)
    seed: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    sim: SimOptions | None = None

    def limit(self) -> int | None:
        return self.max_tokens


class ChatMessage(BaseModel):
    """One message; of a content in parts, the texts count."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: Any = None

    def words(self) -> int:
        parts = self.content if isinstance(self.content, list) else [{"text": self.content}]
        texts = (part.get("text") for part in parts if isinstance(part, dict))
        return sum(len(text.split()) for text in texts if isinstance(text, str))


class ChatRequest(Request):
    """POST /v1/chat/completions, and the shape of its answer."""

    prefix: ClassVar = "chatcmpl"
    objects: ClassVar = ("chat.completion", "chat.completion.chunk")
    tail: ClassVar = (
        "prompt_logprobs prompt_token_ids prompt_text kv_transfer_params ec_transfer_params metrics"
    )
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompts(self) -> list[tuple[str, int]]:
        """The prompt, in a form to hash, and its number of tokens."""
        return [(repr(self.messages), max(1, sum(each.words() for each in self.messages)))]

    @staticmethod
    def choice(index: int, text: str, finish_reason: str) -> Json:
        nulls = _nulls("refusal annotations audio function_call reasoning")
        message = {"role": "assistant", "content": text, **nulls}
        ended = {"logprobs": None, "finish_reason": finish_reason, "stop_reason": None}
        return {"index": index, "message": message, **ended} | _nulls("token_ids routed_experts")

    @staticmethod
    def delta(index: int, text: str, finish_reason: str | None) -> Json:
        delta = {"index": index, "delta": {"content": text}, "logprobs": None}
        nulls = _nulls("stop_reason token_ids" if finish_reason else "token_ids")
        return delta | {"finish_reason": finish_reason, **nulls}

    @staticmethod
    def opening(index: int) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]


class CompletionRequest(Request):
    """POST /v1/completions, and the shape of its answer."""

    prefix: ClassVar = "cmpl"
    objects: ClassVar = ("text_completion", "text_completion")
    tail: ClassVar = "kv_transfer_params ec_transfer_params metrics"
    prompt: list[int] | list[list[int]] | str | list[str] = Field(min_length=1)

    def prompts(self) -> list[tuple[str, int]]:
        """Each prompt, in a form to hash, and its number of tokens."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts: list[Any] = [self.prompt] if is_one else list(self.prompt)
        words = (each.split() if isinstance(each, str) else each for each in prompts)
        return [(repr(each), max(1, len(w))) for each, w in zip(prompts, words, strict=True)]

    @staticmethod
    def choice(index: int, text: str, finish_reason: str) -> Json:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        nulls = "stop_reason token_ids prompt_logprobs prompt_token_ids routed_experts"
        return choice | _nulls(nulls)

    @staticmethod
    def delta(index: int, text: str, finish_reason: str | None) -> Json:
        delta = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return delta | _nulls("stop_reason prompt_token_ids token_ids")

    @staticmethod
    def opening(index: int) -> list[Json]:  # noqa: ARG004 - a completion has none
        return []


AnyRequest = ChatRequest | CompletionRequest
ROUTES: dict[str, type[AnyRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


@dataclass(frozen=True)
class Answer:
    """The whole answer to a request, decided before the first token."""

    request: AnyRequest
    id: str
    model: str
    prompt_tokens: int
    choices: list[list[str]]  # the tokens of each, all of one length
    finish_reason: str
    created: int

    @property
    def length(self) -> int:
        return len(self.choices[0])

    def whole(self) -> Json:
        """The answer of a request that does not stream."""
        texts = enumerate("".join(tokens) for tokens in self.choices)
        choices = [self.request.choice(index, text, self.finish_reason) for index, text in texts]
        usage = self.usage() | _nulls("prompt_tokens_details completion_tokens_details")
        answer = self._head(0, choices) | {"service_tier": None, "system_fingerprint": FINGERPRINT}
        return answer | {"usage": usage} | _nulls(self.request.tail)

    def chunks(self, number: int) -> Iterator[Json]:
        """What streams when every choice has got its token of that number."""
        if number == 0:
            for index in range(len(self.choices)):
                for opening in self.request.opening(index):
                    yield self._head(1, [opening]) | _nulls("prompt_token_ids prompt_text")
        reason = self.finish_reason if number == self.length - 1 else None
        options = self.request.stream_options
        ends_with_usage = bool(options and options.include_usage)
        signature = {"system_fingerprint": FINGERPRINT}
        for index, tokens in enumerate(self.choices):
            chunk = self._head(1, [self.request.delta(index, tokens[number], reason)])
            yield chunk | signature if reason and not ends_with_usage else chunk
        if reason and ends_with_usage:
            yield self._head(1, []) | {"usage": self.usage()} | signature

    def _head(self, kind: int, choices: list[Json]) -> Json:
        head = {"id": self.id, "object": self.request.objects[kind], "created": self.created}
        return head | {"model": self.model, "choices": choices}

    def usage(self) -> Json:
        """How many tokens were asked with and made."""
        made = self.length * len(self.choices)
        total = self.prompt_tokens + made
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": total,
            "completion_tokens": made,
        }


def _nulls(names: str) -> dict[str, None]:
    return dict.fromkeys(names.split())


def make_words(seed: str, count: int) -> list[str]:
    digest = shake_256(seed.encode()).digest(count)
    words = [WORDS[byte % len(WORDS)] for byte in digest]
    return [words[0], *(f" {word}" for word in words[1:])]


def parse(endpoint: type[AnyRequest], body: bytes) -> AnyRequest:
    """The request.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        return endpoint.model_validate_json(body)
    except ValidationError as refused:
        first = refused.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        wrong = f"The request is malformed: {param or 'body'}: {first['msg']}."
        raise InvalidRequestError(wrong, param=param) from None
