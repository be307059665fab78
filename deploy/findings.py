"""Results of the checks of `sluice doctor`, and the program's messages for libraries' errors."""

from enum import StrEnum
from typing import NamedTuple

from tasks.contract.settings import get_settings
from tasks.contract.trouble import Trouble, database_trouble, disk_trouble, redis_trouble


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


def find_trouble(failure: Exception) -> Trouble | None:
    """The trouble behind an error of a library or the system; None: it is a bug of ours."""
    from alembic.util import CommandError
    from redis.exceptions import RedisError
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(failure, RedisError):
        return redis_trouble(failure, get_settings())
    if isinstance(failure, OSError):
        return disk_trouble(failure)
    is_driver = isinstance(failure, ImportError) and "psycopg" in str(failure)
    if is_driver or isinstance(failure, (SQLAlchemyError, CommandError)):
        return database_trouble(failure, get_settings())
    return None
