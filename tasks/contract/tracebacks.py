"""Exceptions as text for the log: of a bounded size and cost, whatever was thrown.

Places and messages only: a frame's variables hold prompts and keys. Messages that are made
of such values are left out as well, unless content is to be logged.
"""

import re
from collections import deque
from collections.abc import Iterator
from types import TracebackType

# Of one exception: the first frames show the caller, the last ones where it went wrong.
FIRST_FRAMES = 4
LAST_FRAMES = 10
MOST_EXCEPTIONS = 5
LONGEST_MESSAGE = 500
LONGEST_TEXT = 10_000

# Errors of Python and its libraries whose messages show a value.
WITH_VALUES = (ValueError, LookupError, TypeError, AssertionError)
# What redis-py puts before an error of a pipeline: the command, with a prompt or an answer.
COMMAND = re.compile(r"(?s)^Command # .* caused error: ")
HIDDEN = "(SLUICE_LOG_CONTENT shows its message)"

CAUSE = "\nThe above exception was the direct cause of the following exception:\n"
CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n"
MEMBER = "\nOne of the exceptions of the group above:\n"


def render(error: BaseException, shows_content: bool) -> str:
    """The exception and what led to it, in Python's form and order."""
    lines: list[str] = []
    for link, wording in reversed(_chain(error)):
        lines += [*_block(link, shows_content), *filter(None, [wording])]
    for member in _members(error):
        lines += [MEMBER, *_block(member, shows_content)]
    text = "\n".join(lines)
    if len(text) > LONGEST_TEXT:
        text = f"{text[: LONGEST_TEXT // 2]}\n…\n{text[-LONGEST_TEXT // 2 :]}"
    return text


def place(error: BaseException) -> str:
    """Where it was raised; '' when that is not known."""
    last = deque(_frames(error), 1)
    return _where(last[0]) if last else ""


def cut(text: str, most: int) -> str:
    """The text, or its beginning and how much is missing."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} more characters)"


def one_line(text: str) -> str:
    """The text without what would begin another line, or move a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " for c in text)


def _chain(error: BaseException) -> list[tuple[BaseException, str]]:
    """The exception, then the ones before it, each with the words that follow it."""
    chain, seen = [(error, "")], {id(error)}
    while len(chain) < MOST_EXCEPTIONS:
        if error.__cause__ is not None:
            before, wording = error.__cause__, CAUSE
        elif error.__context__ is not None and not error.__suppress_context__:
            before, wording = error.__context__, CONTEXT
        else:
            break
        if id(before) in seen:
            break
        seen.add(id(before))
        chain.append((before, wording))
        error = before
    return chain


def _members(error: BaseException) -> list[BaseException]:
    """The exceptions of a group, and of groups in it."""
    found: list[BaseException] = []
    groups = deque([error])
    while groups and len(found) < MOST_EXCEPTIONS:
        group = groups.popleft()
        if isinstance(group, BaseExceptionGroup):
            members = group.exceptions[:MOST_EXCEPTIONS]
            found += members
            groups += members
    return found[:MOST_EXCEPTIONS]


def _block(error: BaseException, shows_content: bool) -> list[str]:
    first: list[TracebackType] = []
    last: deque[TracebackType] = deque(maxlen=LAST_FRAMES)
    frames = 0
    for frame in _frames(error):
        frames += 1
        (first if frames <= FIRST_FRAMES else last).append(frame)
    missing = frames - len(first) - len(last)
    return [
        *(["Traceback (most recent call last):"] if frames else []),
        *(f"  {_where(frame)}" for frame in first),
        *([f"  … {missing} more frames"] if missing else []),
        *(f"  {_where(frame)}" for frame in last),
        _summary(error, shows_content),
    ]


def _frames(error: BaseException) -> Iterator[TracebackType]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _where(frame: TracebackType) -> str:
    code = frame.tb_frame.f_code
    return f'File "{code.co_filename[-200:]}", line {frame.tb_lineno}, in {code.co_name[:100]}'


def message_of(error: BaseException, shows_content: bool) -> str:
    """The exception's message in one line; hidden where it may hold a prompt."""
    if not shows_content and isinstance(error, WITH_VALUES):
        return HIDDEN if error.args else ""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 (anybody's code)
        return "(its message cannot be rendered)"
    if not shows_content:
        # Databases show the row in the lines below.
        message = COMMAND.sub("", message).partition("\n")[0]
    return one_line(cut(message, LONGEST_MESSAGE))


def _summary(error: BaseException, shows_content: bool) -> str:
    """The exception's type and its message."""
    kind = type(error)
    name = (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    message = message_of(error, shows_content)
    return f"{name[:200]}: {message}" if message else name[:200]
