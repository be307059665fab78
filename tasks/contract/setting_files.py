"""Settings out of files: secrets that no list of processes or containers shows.

`SLUICE_ADMIN_KEY_FILE=/run/secrets/admin_key` sets `SLUICE_ADMIN_KEY` to what that file holds.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from tasks.contract.errors import ConfigurationError

SUFFIX = "_FILE"


def read_all(variables: Iterable[str]) -> dict[str, str]:
    """What the files hold that `<VARIABLE>_FILE` name, by the variable that each stands for.

    Raises:
        ConfigurationError: one cannot be read or is empty, or its variable is set as well.
    """
    paths = {name: os.environ.get(name + SUFFIX) for name in variables}
    return {name: _read(name, path) for name, path in paths.items() if path}


def replace_in_environment(variables: Iterable[str]) -> None:
    """Puts what the files hold in the place of their names: for who starts parts that get less.

    Raises:
        ConfigurationError: as for `read_all`.
    """
    for name, value in read_all(variables).items():
        del os.environ[name + SUFFIX]
        os.environ[name] = value


def _read(name: str, path: str) -> str:
    variable = name + SUFFIX
    if os.environ.get(name):
        raise ConfigurationError(f"{name} and {variable} are both set; leave one out")
    try:
        # Editors end a file with a line break.
        value = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as failure:
        why = failure.strerror if isinstance(failure, OSError) else "it is not text in UTF-8"
        raise ConfigurationError(
            f"{variable}={path} cannot be read ({why}); name a file that this user can read"
        ) from None
    if not value:
        raise ConfigurationError(f"{variable}={path} is empty; write the value into that file")
    return value
