"""Lets vLLM go on with an answer that another worker's vLLM has begun.

vLLM's handlers take their tokens from one call of the engine's client, `generate`. Here it notes
every output that it yields. In a later attempt it first yields what earlier ones have noted, so
that the handler rebuilds its state (chat parsing, tools, reasoning, usage) and repeats its output;
then it asks the engine for the rest, with the prompt and all known tokens as the prompt.
Detokenizer and log probabilities are brought to where they stood, half characters and text that may
become a stop string included. A greedy answer comes out as if undisturbed, token for token.

An answer that is yielded as a whole, at its end, costs no note of each token: what there is of it
is noted when the job is paused, from the state that vLLM keeps of it.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from copy import copy
from functools import partial
from typing import Any, NamedTuple

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from gpu_worker.engines.engine import current_job
from gpu_worker.replay_log import ReplayLog, get_replay_log
from tasks.contract.job import Lane

Outputs = AsyncGenerator[RequestOutput, None]

_PLAIN_PROMPT = {"type", "prompt_token_ids", "prompt", "prompt_token_offsets", "cache_salt"}
_PLAIN_PROMPT |= {"arrival_time"}
# These depend on tokens sampled before in a way that a longer prompt does not reproduce.
_WITHOUT = (
    *("presence_penalty", "frequency_penalty", "bad_words", "structured_outputs", "extra_args"),
    *("thinking_token_budget", "repetition_detection", "flat_logprobs"),
    "trace_decode_token_ids",
)

# JSON has no infinity; vLLM answers this instead.
LEAST = -9999.0

_on_added: ContextVar[Callable[[Any, Any], None] | None] = ContextVar("_on_added", default=None)
"""Is called when the engine has the request of the current task."""


class Note(NamedTuple):
    """One output of the engine, as the replay log keeps it."""

    token_ids: Sequence[int]
    text: str
    logprobs: Sequence[Sequence[tuple[int, float, int | None, str | None]]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    cached_tokens: int | None
    cache_creation_tokens: int | None

    @classmethod
    def since(cls, state: Any, known: int) -> "Note":
        """What the engine has made of an answer that it yields as a whole, but so many tokens."""
        logprobs = state.logprobs_processor.logprobs
        return cls(
            list(state.detokenizer.output_token_ids[known:]),
            "",
            _plain(logprobs and logprobs[known:]),
            *(None, None),
            *(state.num_cached_tokens, state.num_cache_creation_tokens),
        )

    def sample_logprobs(self) -> list[dict[int, Any]] | None:
        return self.logprobs and [  # type: ignore[return-value]
            {token: Logprob(*rest) for token, *rest in position} for position in self.logprobs
        ]

    def output(self, prompt: Any, request_id: str) -> RequestOutput:
        """The output once more."""
        completion = CompletionOutput(
            index=0,
            text=self.text,
            token_ids=self.token_ids,
            cumulative_logprob=None,
            logprobs=self.sample_logprobs(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        return RequestOutput(
            request_id=request_id,
            prompt=prompt.get("prompt"),
            prompt_token_ids=prompt["prompt_token_ids"],
            prompt_logprobs=None,
            outputs=[completion],
            finished=self.finish_reason is not None,
            num_cached_tokens=self.cached_tokens,
            num_cache_creation_tokens=self.cache_creation_tokens,
        )


def _fields_of(output: Any) -> tuple[Any, ...]:
    """Those of the note of an output of a single stream of tokens; a Note itself takes longer."""
    (completion,) = output.outputs
    return (
        list(completion.token_ids),
        completion.text,
        _plain(completion.logprobs),
        completion.finish_reason,
        completion.stop_reason,
        output.num_cached_tokens,
        output.num_cache_creation_tokens,
    )


def _plain(logprobs: Any) -> Any:
    """As values that a note can hold."""
    return logprobs and [
        [(token, max(p.logprob, LEAST), p.rank, p.decoded_token) for token, p in position.items()]
        for position in logprobs
    ]


def make_continuable(client: Any) -> None:
    """Has the client's `generate` note what it yields, and begin with what was noted before.

    Set on the instances: vLLM's app uses much of their classes, and all of that stays.
    """
    generate, add_request = client.generate, client.output_processor.add_request
    has_priorities = client.vllm_config.scheduler_config.policy == "priority"

    def generate_with_replay(prompt: Any, params: Any, request_id: str, **options: Any) -> Outputs:
        replay_log = get_replay_log()
        if job := current_job.get():
            params = _bound(params, job.max_tokens)
            if has_priorities:
                options["priority"] = list(Lane).index(job.lane)
        replay_log.streams += 1
        return _generate(generate, replay_log, (prompt, params, request_id), options)

    def add_and_restore(request: Any, *others: Any, **options: Any) -> None:
        add_request(request, *others, **options)
        if on_added := _on_added.get():
            on_added(client.output_processor, request)

    client.generate = generate_with_replay
    client.output_processor.add_request = add_and_restore


async def _generate(
    generate: Callable[..., Outputs],
    replay_log: ReplayLog,
    call: tuple[Any, Any, str],
    options: Any,
) -> Outputs:
    prompt, params, request_id = call
    replay_log.can_continue = replay_log.streams == 1 and _is_continuable(prompt, params)
    known = [Note(*note) for note in replay_log.earlier] if replay_log.can_continue else []  # type: ignore[misc]
    is_whole = _is_whole(params)
    for note in known:
        replay_log.count(len(prompt["prompt_token_ids"]), len(note.token_ids), request_id)
        if not is_whole:
            yield note.output(prompt, request_id)
    if known and known[-1].finish_reason is not None:
        return
    async with aclosing(_ask(generate, replay_log, call, known, options)) as outputs:
        async for output in outputs:
            new_tokens = sum([len(choice.token_ids) for choice in output.outputs])
            if is_whole:
                new_tokens -= len(_tokens_of(known))
                replay_log.unnoted.pop(request_id, None)
                if known:
                    output.num_cached_tokens = known[0].cached_tokens
            elif replay_log.can_continue:
                replay_log.note(_fields_of(output))
            else:
                replay_log.advance()
            replay_log.count(len(output.prompt_token_ids or ()), new_tokens, request_id)
            yield output


def _ask(
    generate: Callable[..., Outputs],
    replay_log: ReplayLog,
    call: tuple[Any, Any, str],
    known: Sequence[Note],
    options: Any,
) -> Outputs:
    """Asks the engine for what comes after the known outputs."""
    prompt, params, request_id = call

    states: list[Any] = []

    def on_added(processor: Any, request: Any) -> None:
        states.append(processor.request_states[request.request_id])
        if known:
            _restore(processor, request, prompt, params, known)
        if _is_whole(params):
            made = lambda: sum(map(_made, states)) - len(_tokens_of(known))
            replay_log.unnoted[request_id] = made
            replay_log.count(len(states[0].prompt_token_ids or ()), 0, request_id)
            replay_log.catch_up = partial(_catch_up, replay_log, processor, states[0], known)

    _on_added.set(on_added)
    rest = _rest_of(prompt, params, known) if known else (prompt, params)
    return generate(*rest, request_id, **options)


def _made(state: Any) -> int:
    """Tokens of an answer so far."""
    return int(state.detokenizer.num_output_tokens()) if state.detokenizer else 0


def _is_whole(params: Any) -> bool:
    """Whether the answer is yielded once, when it is complete."""
    return getattr(params, "output_kind", None) is RequestOutputKind.FINAL_ONLY


def _bound(params: Any, most: int | None) -> Any:
    """With no more tokens than the job may have, which limits of its key may have lowered."""
    if most is None or not isinstance(params, SamplingParams) or (params.max_tokens or 0) <= most:
        return params
    bounded = params.clone()
    # Where only the prompt is wanted again, vLLM makes a token and leaves it out.
    bounded.max_tokens, bounded.min_tokens = max(most, 1), min(params.min_tokens, most)
    return bounded


def _is_continuable(prompt: Any, params: Any) -> bool:
    """Whether a longer prompt and fewer tokens ask for the rest of the same answer."""
    return (
        isinstance(prompt, dict)
        and prompt.get("type") == "token"
        and prompt.keys() <= _PLAIN_PROMPT
        and isinstance(params, SamplingParams)
        and params.n == 1
        and params.output_kind in (RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY)
        and all(getattr(params, name) in (None, False, 0, []) for name in _WITHOUT)
        and params.prompt_logprobs is None
        and params.prompt_logprob_token_ids is None
    )


def _tokens_of(known: Sequence[Note]) -> list[int]:
    return [token for note in known for token in note.token_ids]


def _rest_of(prompt: Any, params: Any, known: Sequence[Note]) -> tuple[Any, Any]:
    """Prompt and parameters that ask for what comes after the known outputs."""
    tokens = _tokens_of(known)
    rest = params.clone()
    rest.max_tokens = params.max_tokens and params.max_tokens - len(tokens)
    rest.min_tokens = max(0, params.min_tokens - len(tokens))
    if params.seed is not None:
        # The generator's state is lost; the seed itself would draw the first numbers again.
        rest.seed = params.seed + len(tokens)
    longer = prompt | {"prompt_token_ids": [*prompt["prompt_token_ids"], *tokens]}
    longer.pop("prompt_token_offsets", None)
    return longer, rest


def _restore(processor: Any, request: Any, prompt: Any, params: Any, known: Sequence[Note]) -> None:
    """Brings what makes text of tokens to where the earlier attempt had it."""
    tokens, state = _tokens_of(known), processor.request_states[request.request_id]
    state.prompt_token_ids = prompt["prompt_token_ids"]
    state.prompt_len = len(state.prompt_token_ids)
    state.sent_tokens_offset = len(tokens)
    first = copy(request)
    first.prompt_token_ids = state.prompt_token_ids
    first.sampling_params = params
    tokenizer = processor.tokenizer if params.detokenize else None
    state.detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, first)
    state.detokenizer.update(tokens, False)
    state.detokenizer.get_next_output_text(False, True)
    if state.logprobs_processor.logprobs is not None:
        for note in known:
            state.logprobs_processor.logprobs.extend(note.sample_logprobs() or [])


def _catch_up(replay_log: ReplayLog, processor: Any, state: Any, known: Sequence[Note]) -> bool:
    """Notes what there is of an answer that is yielded as a whole; False: it is complete."""
    if state.request_id not in processor.request_states:
        return False
    note = Note.since(state, len(_tokens_of(known)))
    if note.token_ids:
        replay_log.note(tuple(note))
    return True
