"""The load client's input and output: one line of JSON each."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self
from urllib.parse import urlsplit

QUESTIONS = (
    "Hello!",
    "What is Sluice?",
    "How do I start it?",
    "What is a ticket?",
    "Where do tokens go?",
    "Which port does the API use?",
    "What does the worker do?",
    "How can I cancel a job?",
    "What happens when a worker dies?",
    "Why is Redis needed?",
    "How do I use my own model?",
    "What is a lease?",
    "Does it need a GPU?",
    "How do I stream an answer?",
    "What is continuous batching?",
    "Who are you?",
    "How are batches run?",
    "What is time to first token?",
    "Can I use the OpenAI SDK?",
    "Thank you, and goodbye.",
)


WORDS = sorted({word for question in QUESTIONS for word in question.split()})


@dataclass(frozen=True)
class Load:
    """A closed loop: `streams` connections, each sending its next request on completion.

    With `per_s` an open one: a request that no connection was free for waits from its time on.
    """

    url: str  # of the server: http(s)://HOST:PORT, and what comes before /v1
    model: str
    streams: int
    requests: int
    max_tokens: int = 64
    is_exact: bool = True  # an answer of fewer tokens is wrong: the server knows ignore_eos
    api_key: str = ""
    mixed: bool = False  # every second request does not stream
    whole: bool = False  # no request streams
    per_s: float = 0  # requests, evenly spread; 0: each as soon as a connection is free
    seed: int = 1
    prompt_words: int = 0  # at random, so that no two prompts begin alike; 0: the short questions
    stall_s: float = 60  # without any completion for so long, the rest counts as failed
    # The SLA, which decides what counts as goodput.
    sla_ttft_ms: float = math.inf
    sla_tpot_ms: float = math.inf

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> Self:
        return cls(**json.loads(line))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        target = urlsplit(self.url)
        return target.hostname or "", target.port or (443 if target.scheme == "https" else 80)

    def http_requests(self) -> list[bytes]:
        """The requests as bytes on the wire; the same for the same fields."""
        source = random.Random(self.seed)
        if self.prompt_words:
            texts = (source.choices(WORDS, k=self.prompt_words) for _ in range(self.requests))
            questions = [" ".join(words) for words in texts]
        else:
            questions = source.choices(QUESTIONS, k=self.requests)
        return [
            self._http_request(question, streaming=not (self.whole or (self.mixed and number % 2)))
            for number, question in enumerate(questions)
        ]

    def _http_request(self, question: str, *, streaming: bool) -> bytes:
        # ignore_eos makes every answer equally long, so that both servers do the same work.
        document: dict[str, object] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        if streaming:
            document |= {"stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps(document).encode()
        target = urlsplit(self.url)
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"POST {target.path.rstrip('/')}/v1/chat/completions HTTP/1.1\r\n"
            f"Host: {target.netloc}\r\n"
            f"Content-Type: application/json\r\n{key}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True)
class Percentiles:
    """Of the times of one round; NaN where there were none."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of_ms(cls, values_s: Sequence[float]) -> Self:
        """Of seconds, in milliseconds."""
        return cls(*(percentile_ms(values_s, percent) for percent in (50, 95, 99)))


@dataclass(frozen=True)
class Measurement:
    """One round of load on one server, as its client saw it."""

    wall_s: float
    completed: int
    tokens: int  # as the usage of the answers counts them: an event may carry several
    ttft_ms: Percentiles  # from sending the request to the first event with text
    tpot_ms: Percentiles  # (last event - first event) / (tokens - 1), per request
    gap_ms: Percentiles  # between successive events with text; events of one read are 0 apart
    end_to_end_ms: Percentiles  # from sending the request to the end of the answer
    client_cpu_s: float
    errors: dict[str, int]  # what went wrong, how often
    events: int = 0  # with text, of all streams
    within_sla: int = 0  # streams that completed and were as fast as the load's SLA wants

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> Self:
        fields = json.loads(line)
        times = {name: Percentiles(**fields[name]) for name in fields if name.endswith("_ms")}
        return cls(**fields | times)

    @property
    def requests_per_s(self) -> float:
        return self.completed / self.wall_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def goodput(self) -> float:
        """Requests per second that were within the SLA."""
        return self.within_sla / self.wall_s


def percentile_ms(values_s: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile in milliseconds; NaN of nothing."""
    if not values_s:
        return math.nan
    rank = max(math.ceil(len(values_s) * percent / 100), 1)
    return sorted(values_s)[rank - 1] * 1000
