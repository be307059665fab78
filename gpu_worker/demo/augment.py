"""Varies a question as people do: politeness, case, punctuation, missing words, typos."""

from random import Random

from gpu_worker.demo.texts import read

VARIANTS = read("variants.yaml")
SMALL_WORDS = frozenset(VARIANTS["small_words"])


def vary(question: str, rng: Random, *, keep_words: bool = False) -> str:
    """A variant of the question; with keep_words nothing but its case and punctuation changes."""
    if not keep_words:
        question = _typo(_drop_word(_swap(_wrap(question, rng), rng), rng), rng)
    return _punctuate(_recase(question, rng), rng)


def _wrap(question: str, rng: Random) -> str:
    if rng.random() < 0.18:
        question = rng.choice(VARIANTS["prefixes"]) + _lower_first(question)
    if rng.random() < 0.12:
        body = question.rstrip("?")
        question = body + rng.choice(VARIANTS["suffixes"]) + question[len(body) :]
    return question


def _lower_first(text: str) -> str:
    first = text.split(" ", 1)[0]
    keep = first in {"I", "Sluice", "Redis", "Celery", "Flask"} or first[1:2].isupper()
    return text if keep else text[:1].lower() + text[1:]


def _swap(question: str, rng: Random) -> str:
    if rng.random() < 0.5:
        return question
    fitting = [(old, new) for old, new in VARIANTS["swaps"] if old in question]
    if not fitting:
        return question
    old, new = rng.choice(fitting)
    return question.replace(old, new, 1)


def _drop_word(question: str, rng: Random) -> str:
    words = question.split()
    small = [i for i, word in enumerate(words) if word.lower() in SMALL_WORDS]
    if len(words) < 4 or not small or rng.random() > 0.08:
        return question
    del words[rng.choice(small)]
    return " ".join(words)


def _typo(question: str, rng: Random) -> str:
    """Drop, double or swap one letter now and then."""
    if len(question) < 8 or rng.random() > 0.1:
        return question
    i = rng.randrange(1, len(question) - 2)
    two = question[i : i + 2]
    if not two.isalpha():
        return question
    return question[:i] + rng.choice((two[1], two[0] + two, two[::-1])) + question[i + 2 :]


def _recase(question: str, rng: Random) -> str:
    draw = rng.random()
    if draw < 0.25:
        return question.lower()
    if draw < 0.28:
        return question.upper()
    return question


def _punctuate(question: str, rng: Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        return question.rstrip("?")
    if draw < 0.33:
        return question + rng.choice(("?", "!", ".", " ?", "..."))
    if draw < 0.4 and not question.endswith("?"):
        return question + rng.choice((".", "!", "?"))
    return question
