"""What answers tell beside their content: what limits leave, in OpenAI's form; who stepped in."""

from flask import Response, g, has_request_context

from tasks.contract.access import Allowance


def note_left(allowance: Allowance) -> None:
    """Has the answer to the current request tell what is left of limits; `x-ratelimit-*`."""
    for kind, left in allowance._asdict().items():
        if left:
            _note(f"x-ratelimit-limit-{kind}", str(left.most))
            _note(f"x-ratelimit-remaining-{kind}", str(left.left))
            _note(f"x-ratelimit-reset-{kind}", _as_duration(left.resets_s))


def note_fallback(reason: str) -> None:
    """Has it tell why another model than the wanted one serves; `x-sluice-model` has which."""
    _note("x-sluice-fallback", reason)


def note_degradation(what: str) -> None:
    """Has it tell what is less than was asked for, as the model is busy."""
    _note("x-sluice-degraded", what)


def _note(name: str, value: str) -> None:
    if has_request_context():
        g.setdefault("told", {})[name] = value


def add_headers(response: Response) -> Response:
    """Adds what was noted."""
    response.headers.update(g.get("told", {}))
    return response


def _as_duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{rest:.3f}s" if minutes else f"{rest:.3f}s"
