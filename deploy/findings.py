"""What the checks of `sluice doctor` say, and how they say it without a password."""

import re
from enum import StrEnum
from typing import NamedTuple
from urllib.parse import unquote

from tasks.settings import SECRET_FIELDS, Settings

# In this order: `?password=`; `://user:password@` up to the last @, as people forget to escape.
_PASSWORDS = re.compile(r"(?i)(password=)([^&]+)"), re.compile(r"(://[^:@/?]*:)(.+)(?=@)")


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


class Remark(NamedTuple):
    """One thing that a check found, and what to do about it unless all is well."""

    level: Level
    found: str
    do: str = ""


class UnusableError(Exception):
    """What was checked cannot be used at all: checks that need it are left out."""

    def __init__(self, found: str, do: str) -> None:
        super().__init__(found)
        self.remark = wrong(found, do)


def ok(found: str) -> Remark:
    return Remark(Level.OK, found)


def warning(found: str, do: str) -> Remark:
    return Remark(Level.WARNING, found, do)


def wrong(found: str, do: str) -> Remark:
    return Remark(Level.WRONG, found, do)


def without_password(url: str) -> str:
    """The URL as it may be shown, also one that cannot be parsed."""
    for password in _PASSWORDS:
        url = password.sub(r"\1…", url)
    return url


def explain(error: BaseException, settings: Settings) -> str:
    """The first line of an error that somebody else has worded, without any of our secrets."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    for secret in sorted(_secrets(settings), key=len, reverse=True):
        text = text.replace(secret, "…")
    return text


def _secrets(settings: Settings) -> set[str]:
    urls = settings.redis_url, settings.bus_url, settings.database_url, settings.api_url
    found = {
        match[2] for url in urls for password in _PASSWORDS for match in password.finditer(url)
    }
    found |= {getattr(settings, name) for name in SECRET_FIELDS} | set(settings.signing_secrets)
    return {form for secret in found if secret for form in (secret, unquote(secret))}
