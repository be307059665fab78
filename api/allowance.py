"""What a key has left of its limits, as headers of OpenAI's form: `x-ratelimit-*`."""

from flask import Response, g, has_request_context

from tasks.contract.access import Allowance


def note(allowance: Allowance) -> None:
    """Has the answer to the current request tell it."""
    if has_request_context():
        g.allowance = allowance


def add_headers(response: Response) -> Response:
    """Adds what was noted; a limit that there is not has no headers."""
    allowance: Allowance = g.get("allowance", Allowance(None, None))
    for kind, left in allowance._asdict().items():
        if left:
            response.headers[f"x-ratelimit-limit-{kind}"] = str(left.most)
            response.headers[f"x-ratelimit-remaining-{kind}"] = str(left.left)
            response.headers[f"x-ratelimit-reset-{kind}"] = _as_duration(left.resets_s)
    return response


def _as_duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{rest:.3f}s" if minutes else f"{rest:.3f}s"
