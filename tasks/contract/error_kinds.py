"""All classes of errors there are, and the one that a code stands for."""

import tasks.contract.job_errors  # noqa: F401 (so that its classes are known)
from tasks.contract.errors import SluiceError


def all_kinds() -> list[type[SluiceError]]:
    """The classes of errors, each after those that it is made of."""
    kinds: list[type[SluiceError]] = [SluiceError]
    for kind in kinds:  # grows meanwhile
        kinds += kind.__subclasses__()
    return kinds


def kind_of(code: object) -> type[SluiceError]:
    """The class of the errors with that code: whether to retry is not in the body."""
    return next((kind for kind in all_kinds() if kind.code == code), SluiceError)
