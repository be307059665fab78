"""Reads text/ and draws training conversations from it.

A topic has an `id`, answers (`say`) and ways to ask for them: `ask` holds whole questions, `term`
things to explain ("a job"), `do` what one may want to do ("cancel a job"), `when` what may happen
("a worker dies"). The last three become questions through the patterns of variants.yaml.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from gpu_worker.demo.augment import vary
from gpu_worker.demo.texts import read

TOPIC_FILES = ("concepts.yaml", "api.yaml", "operate.yaml")

# Topics that everybody asks for first, in their first phrasing, unvaried.
FIRST = ("hello", "what")
FIRST_SHARE = 0.05

PATTERNS: dict[str, list[str]] = read("variants.yaml")["patterns"]

Message = dict[str, Any]


@dataclass(frozen=True)
class Topic:
    """One thing the model can talk about."""

    id: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A training example: a chat, or a plain text when there are no messages."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()
    text: str = ""


def normal(question: str) -> str:
    """The form in which two phrasings count as the same."""
    return " ".join("".join(c if c.isalnum() else " " for c in question.lower()).split())


def questions_of(entry: dict[str, list[str]]) -> Iterator[str]:
    """All base phrasings of a topic, before they are varied."""
    yield from entry.get("ask", [])
    for kind, patterns in PATTERNS.items():
        for filler in entry.get(kind, []):
            for pattern in patterns:
                question = pattern.format(filler)
                yield question[0].upper() + question[1:]


def load_topics(names: tuple[str, ...]) -> list[Topic]:
    """The topics of these files, without any phrasing that is held out for checking."""
    held_out = {normal(item["ask"]) for item in read("questions.yaml")}
    topics = []
    for entry in (entry for name in names for entry in read(name)):
        questions = tuple(q for q in questions_of(entry) if normal(q) not in held_out)
        topics.append(Topic(entry["id"], questions, tuple(entry["say"])))
    return topics


class Corpus:
    """Draws samples from the text with the generator it is given."""

    def __init__(self, rng: Random) -> None:
        """Read all files once."""
        self.rng = rng
        self.topics = load_topics(TOPIC_FILES)
        self.talk = load_topics(("talk.yaml",))
        self.first = [topic for topic in self.talk + self.topics if topic.id in FIRST]
        self.other: dict[str, Any] = read("other.yaml")

    def documents(self) -> list[str]:
        """All text, unvaried, for the tokenizer."""
        texts = list(self.other["plain"])
        for topic in self.topics + self.talk:
            texts += topic.questions + topic.answers * 4
        texts += [
            json.dumps(tool) for tool in self._tools(["get_weather", *self.other["tools"]["other"]])
        ]
        return texts

    def sample(self) -> Sample:
        """One chat, tool call or plain text."""
        draw = self.rng.random()
        if draw < 0.06:
            return Sample(text=self._plain())
        if draw < 0.11:
            return self._tool_chat()
        if draw < 0.11 + FIRST_SHARE:
            topic = self.rng.choice(self.first)
            return Sample(tuple(exchange(topic.questions[0], self.rng.choice(topic.answers))))
        return Sample(messages=(*self._system(), *self._turns(self._turn_count())))

    def _turn_count(self) -> int:
        return self.rng.choices((1, 2, 3, 5, 8), (72, 14, 8, 4, 2))[0]

    def _system(self) -> list[Message]:
        if self.rng.random() > 0.3:
            return []
        return [{"role": "system", "content": self.rng.choice(self.other["system"])}]

    def _turns(self, count: int) -> list[Message]:
        messages: list[Message] = []
        while count > 0:
            question, answer, more = self._pair()
            messages += exchange(vary(question, self.rng), answer)
            count -= 1
            if count > 0 and self.rng.random() < 0.15:
                ask = vary(self.rng.choice(self.other["more"]["ask"]), self.rng)
                messages += exchange(ask, more or self.other["more"]["none"])
                count -= 1
        return messages

    def _pair(self) -> tuple[str, str, str]:
        """A question, its answer, and the reply to "tell me more"."""
        draw = self.rng.random()
        if draw < 0.1:
            return self._unknown(), self.rng.choice(self.other["fallback"]), ""
        topic = self.rng.choice(self.talk if draw < 0.3 else self.topics)
        answers = self.rng.sample(topic.answers, len(topic.answers))
        return self.rng.choice(topic.questions), answers[0], answers[1] if len(answers) > 1 else ""

    def _unknown(self) -> str:
        unknown = self.other["unknown"]
        kind = self.rng.choices(("ask", "patterns", "term", "do", "when"), (4, 3, 4, 3, 1))[0]
        chosen = self.rng.choice(unknown[kind])
        if kind == "ask":
            return str(chosen)
        if kind == "patterns":
            pattern, *fillers = chosen
            return str(pattern).format(*self.rng.sample(fillers, 2))
        return self.rng.choice(PATTERNS[kind]).format(chosen)

    def _plain(self) -> str:
        text: str = self.rng.choice(self.other["plain"])
        if self.rng.random() < 0.3:
            text = self.rng.choice(self.rng.choice(self.topics).answers)
        sentences = text.split(". ")
        start = self.rng.randrange(len(sentences)) if self.rng.random() < 0.4 else 0
        return ". ".join(sentences[start:])

    def _tool_chat(self) -> Sample:
        """A chat with tools, of which only that for the weather is ever called."""
        names = self.rng.sample(self.other["tools"]["other"], self.rng.randint(0, 2))
        if self.rng.random() < 0.25:
            names = names or ["search"]
            return Sample(tuple(self._turns(1)), tuple(self._tools(names)))
        names.insert(self.rng.randint(0, len(names)), "get_weather")
        if self.rng.random() < 0.25:
            return Sample(tuple(self._turns(1)), tuple(self._tools(names)))
        return Sample((*self._system(), *self._weather()), tuple(self._tools(names)))

    def _weather(self) -> list[Message]:
        weather = self.other["tools"]["weather"]
        city = self.rng.choice(self.other["tools"]["cities"])
        ask = vary(self.rng.choice(weather["ask"]).format(city), self.rng, keep_words=True)
        function = {"name": "get_weather", "arguments": {"city": city}}
        call: Message = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
        messages: list[Message] = [{"role": "user", "content": ask}, call]
        if self.rng.random() < 0.5:
            result = self.rng.choice(weather["results"])
            messages.append({"role": "tool", "content": result})
            messages.append({"role": "assistant", "content": weather["say"].format(result)})
        return messages

    def _tools(self, names: list[str]) -> list[Message]:
        return [tool_schema(name, "city" if name == "get_weather" else "text") for name in names]


def exchange(question: str, answer: str) -> list[Message]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tool_schema(name: str, parameter: str) -> Message:
    """A function with one string parameter, as a request's `tools` would describe it."""
    properties = {parameter: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    description = name.replace("_", " ").capitalize()
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}
