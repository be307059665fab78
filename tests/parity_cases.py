"""Requests to compare: id, path, body. Temperature is 0 unless a body sets it."""

from typing import Any

Body = dict[str, Any]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
STREAM: Body = {"stream": True}
USAGE: Body = STREAM | {"stream_options": {"include_usage": True}}
CONTINUOUS: Body = STREAM | {
    "stream_options": {"include_usage": True, "continuous_usage_stats": True}
}
# So that the length of the answer does not depend on the model.
LONG: Body = {"ignore_eos": True, "max_tokens": 40}


def _json_schema(schema: object) -> Body:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}


def _chat(**body: Any) -> Body:
    return {"messages": HELLO, "temperature": 0, "max_tokens": 24} | body


def _turns(*contents: object, **body: Any) -> Body:
    """A conversation, the user first, then in turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]
    return _chat(**{"messages": messages} | body)


def _text(**body: Any) -> Body:
    return {"prompt": "A job is", "temperature": 0, "max_tokens": 12} | body


_CHATS: dict[str, Body] = {
    "plain": _chat(),
    "to-its-end": _chat(max_tokens=200),
    "stream": _chat(**STREAM),
    "stream-to-its-end": _chat(max_tokens=200, **STREAM),
    "usage": _chat(**USAGE),
    "usage-in-each-chunk": _chat(**CONTINUOUS),
    "usage-not-asked-for": _chat(stream=True, stream_options={"include_usage": False}),
    "no-stream": _chat(stream=False),
    "stream-null": _chat(stream=None),
    "system": _chat(messages=[{"role": "system", "content": "Be brief."}, *HELLO]),
    "developer": _chat(messages=[{"role": "developer", "content": "Be brief."}, *HELLO]),
    "turns": _turns("Hello", "Hello!", "What is a job?", **STREAM),
    "parts": _turns([{"type": "text", "text": "What is"}, {"type": "text", "text": " a job?"}]),
    "named-user": _chat(messages=[{"role": "user", "name": "ann", "content": "Hello"}], user="u1"),
    "unicode": _turns("Grüße, 世界 🚀👩‍👩‍👧 \u2028 \x00 end", **STREAM),
    "echoed-unicode": _chat(structured_outputs={"choice": ["日本 🚀 \u2028 ü"]}, **STREAM),
    "alias": _chat(model="gpt-3.5-turbo"),
    "alias-with-slash": _chat(model="meta-llama/Meta-Llama-3-8B-Instruct", **STREAM),
    "its-name": _chat(model="sluice-demo"),
    "model-null": _chat(model=None),
    "stop": _chat(stop=["e"]),
    "stop-stream": _chat(stop="o", **STREAM),
    "stop-included": _chat(stop=["e", "o"], include_stop_str_in_output=True, **STREAM),
    "stop-token": _chat(stop_token_ids=[300, 301], ignore_eos=True),
    "seed": _chat(seed=7, temperature=0.8, top_p=0.9, top_k=20),
    "seed-stream": _chat(seed=7, temperature=0.8, min_p=0.05, **STREAM),
    "n": _chat(n=2, seed=3, temperature=0.9),
    "n-stream": _chat(n=2, seed=3, temperature=0.9, **USAGE),
    "n-greedy": _chat(n=2),
    "n-seed-stream": _chat(n=3, seed=1, temperature=1, **STREAM),
    "logprobs": _chat(logprobs=True, top_logprobs=3, max_tokens=5),
    "logprobs-stream": _chat(logprobs=True, top_logprobs=2, max_tokens=5, **STREAM),
    "logprobs-no-top": _chat(logprobs=True, max_tokens=3),
    "prompt-logprobs": _chat(prompt_logprobs=1, max_tokens=2),
    "token-ids": _chat(return_token_ids=True),
    "token-ids-stream": _chat(return_token_ids=True, **STREAM),
    "max-completion-tokens": {"messages": HELLO, "temperature": 0, "max_completion_tokens": 3},
    "ignore-eos": _chat(**LONG),
    "ignore-eos-stream": _chat(**LONG, **USAGE),
    "min-tokens": _chat(min_tokens=40, max_tokens=60, **STREAM),
    "penalties": _chat(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5, **LONG),
    "logit-bias": _chat(logit_bias={"300": 100}, max_tokens=4, **STREAM),
    "bad-words": _chat(bad_words=["Hello"], max_tokens=8),
    "allowed-tokens": _chat(allowed_token_ids=[300, 301, 302], max_tokens=4),
    "json-object": _chat(response_format={"type": "json_object"}, max_tokens=12),
    "json-schema": _chat(response_format=_json_schema(SCHEMA), max_tokens=60),
    "json-schema-stream": _chat(response_format=_json_schema(SCHEMA), max_tokens=60, **STREAM),
    "format-text": _chat(response_format={"type": "text"}),
    "choice": _chat(structured_outputs={"choice": ["yes", "no"]}),
    "regex": _chat(structured_outputs={"regex": r"\d{3}-[a-c]{2}"}, **USAGE),
    "grammar": _chat(structured_outputs={"grammar": 'root ::= "a" | "b" "c"'}),
    "tools-auto": _chat(tools=[TOOL]),
    "tools-auto-stream": _chat(tools=[TOOL], tool_choice="auto", **STREAM),
    "tools-named": _chat(tools=[TOOL], tool_choice=NAMED, max_tokens=60),
    "tools-named-stream": _chat(tools=[TOOL], tool_choice=NAMED, max_tokens=60, **STREAM),
    "tools-none": _chat(tools=[TOOL], tool_choice="none"),
    "tools-required": _chat(tools=[TOOL], tool_choice="required", max_tokens=80),
    "tools-required-stream": _chat(tools=[TOOL], tool_choice="required", max_tokens=80, **STREAM),
    "tool-result": _chat(
        messages=[
            *HELLO,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
        ],
        tools=[TOOL],
    ),
    "template-kwargs": _chat(chat_template_kwargs={"add_generation_prompt": False}),
    "own-template": _chat(chat_template="{{ messages[0].content }}"),
    "no-generation-prompt": _chat(add_generation_prompt=False),
    "continued": _turns(
        "Hello", "Hello! I am", add_generation_prompt=False, continue_final_message=True
    ),
    "echo": _turns("Hello", "Hel", add_generation_prompt=False, echo=True),
    "unknown-field": _chat(no_such_field=1),
    "own-request-id": _chat(request_id="mine", **STREAM),
    "empty-messages": _chat(messages=[]),
    "no-messages": {"temperature": 0},
    "empty-object": {},
    "messages-a-string": _chat(messages="Hello"),
    "content-a-number": _turns(7),
    "content-null": _turns(None),
    "bad-part": _turns([{"type": "smell", "smell": "rose"}]),
    "image-for-a-text-model": _turns(
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    ),
    "bad-role": _chat(messages=[{"role": "robot", "content": "Hello"}]),
    "no-role": _chat(messages=[{"content": "Hello"}]),
    "stream-a-word": _chat(stream="perhaps"),
    "stream-as-word": _chat(stream="true"),
    "model-a-number": _chat(model=5),
    "unknown-model": _chat(model="no-such-model"),
    "unknown-model-stream": _chat(model="no-such-model", **STREAM),
    "empty-model": _chat(model=""),
    "temperature-a-word": _chat(temperature="warm"),
    "temperature-negative": _chat(temperature=-1),
    "temperature-high": _chat(temperature=2.5, top_k=1, max_tokens=4),
    "top-p-too-large": _chat(top_p=1.5),
    "top-p-zero": _chat(top_p=0),
    "n-zero": _chat(n=0),
    "max-tokens-zero": _chat(max_tokens=0),
    "max-tokens-negative": _chat(max_tokens=-1, **STREAM),
    "max-tokens-a-word": _chat(max_tokens="many"),
    "max-tokens-above-context": _chat(max_tokens=4096),
    "min-above-max-tokens": _chat(min_tokens=50, max_tokens=4),
    "prompt-too-long": _turns("Hello " * 3000),
    "prompt-too-long-stream": _turns("Hello " * 3000, **STREAM),
    "too-many-logprobs": _chat(logprobs=True, top_logprobs=1000),
    "top-logprobs-alone": _chat(top_logprobs=2),
    "penalty-out-of-range": _chat(presence_penalty=9),
    "repetition-penalty-zero": _chat(repetition_penalty=0),
    "seed-a-word": _chat(seed="lucky"),
    "stop-a-number": _chat(stop=7),
    "logit-bias-unknown-token": _chat(logit_bias={"999999": 1}),
    "usage-without-stream": _chat(stream_options={"include_usage": True}),
    "format-unknown": _chat(response_format={"type": "xml"}),
    "format-without-schema": _chat(response_format={"type": "json_schema"}),
    "schema-invalid": _chat(response_format=_json_schema({"type": "no-such-type"})),
    "regex-invalid": _chat(structured_outputs={"regex": "("}, **STREAM),
    "two-structures": _chat(structured_outputs={"choice": ["a"], "regex": "b"}),
    "choice-a-number": _chat(structured_outputs={"choice": 5}),
    "tools-a-word": _chat(tools="hammer"),
    "tools-empty": _chat(tools=[]),
    "tool-without-name": _chat(tools=[{"type": "function", "function": {}}]),
    "tool-schema-invalid": _chat(
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
        tool_choice="required",
    ),
    "tool-choice-unknown": _chat(tools=[TOOL], tool_choice={"type": "function", "function": {}}),
    "tool-choice-not-among-tools": _chat(
        tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}
    ),
    "tool-choice-without-tools": _chat(tool_choice="required"),
    "continued-and-prompted": _turns("Hello", "Hel", continue_final_message=True),
    "bad-template": _chat(chat_template="{% if %}"),
}

_TEXTS: dict[str, Body] = {
    "plain": _text(),
    "no-max-tokens": {"prompt": "A job is", "temperature": 0},
    "stream": _text(**STREAM),
    "usage": _text(**USAGE),
    "usage-in-each-chunk": _text(**CONTINUOUS),
    "prompts": _text(prompt=["A job is", "A ticket is"]),
    "prompts-stream": _text(prompt=["A job is", "A ticket is"], **USAGE),
    "token-ids": _text(prompt=[300, 301, 302], return_token_ids=True),
    "lists-of-token-ids": _text(prompt=[[300, 301], [302]], **STREAM),
    "echo": _text(echo=True, max_tokens=3),
    "echo-stream": _text(echo=True, max_tokens=3, **STREAM),
    "echo-logprobs": _text(echo=True, logprobs=1, max_tokens=2),
    "logprobs": _text(logprobs=2, max_tokens=4),
    "logprobs-stream": _text(logprobs=2, max_tokens=4, **STREAM),
    "n": _text(n=2, seed=3, temperature=0.9),
    "n-stream": _text(n=2, seed=3, temperature=0.9, **STREAM),
    "stop": _text(stop=[" "], max_tokens=30),
    "seed": _text(seed=11, temperature=1),
    "ignore-eos-stream": _text(**LONG, **STREAM),
    "suffix": _text(suffix="!"),
    "json-schema": _text(response_format=_json_schema(SCHEMA), max_tokens=60),
    "regex-stream": _text(structured_outputs={"regex": "[ab]{5}"}, **STREAM),
    "prompt-logprobs": _text(prompt_logprobs=1, max_tokens=1),
    "truncated": _text(truncate_prompt_tokens=2),
    "beam-search": _text(use_beam_search=True, n=2),
    "unicode": _text(prompt="Żółć 🚀", **STREAM),
    "empty-prompt": _text(prompt=""),
    "no-prompt": {"temperature": 0},
    "prompt-a-number": _text(prompt=5),
    "prompt-null": _text(prompt=None),
    "prompt-empty-list": _text(prompt=[]),
    "token-id-unknown": _text(prompt=[999999]),
    "token-id-negative": _text(prompt=[-1]),
    "prompt-mixed": _text(prompt=["a", 1]),
    "prompt-too-long": _text(prompt="Hello " * 3000),
    "max-tokens-zero": _text(max_tokens=0),
    "max-tokens-negative": _text(max_tokens=-5),
    "max-tokens-above-context": _text(max_tokens=4096, **STREAM),
    "logprobs-too-many": _text(logprobs=1000),
    "n-negative": _text(n=-1),
    "unknown-model": _text(model="no-such-model"),
    "usage-without-stream": _text(stream_options={"include_usage": True}),
    "chat-body": {"messages": HELLO},
}

CASES: dict[str, tuple[str, object]] = {
    **{f"chat-{name}": (CHAT, body) for name, body in _CHATS.items()},
    **{f"text-{name}": (TEXT, body) for name, body in _TEXTS.items()},
    "chat-list": (CHAT, [1, 2]),
    "chat-string": (CHAT, "Hello"),
    "chat-null": (CHAT, None),
    "text-number": (TEXT, 5),
}
