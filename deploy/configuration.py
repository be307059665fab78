"""The tables of settings in docs/configuration.md, made of tasks/contract/settings.py.

`make docs` writes them; a setting's meaning comes from its description there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.contract.settings import PREFIX, Settings

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- The tables come from tasks/contract/settings.py: `make docs` -->\n"
END = "<!-- End of the tables -->\n"
# The headings, by the setting that follows.
SECTIONS = {
    "redis_url": "Where the parts are",
    "allowed_hosts": "What the API takes",
    "lease_s": "Jobs and workers",
    "log_format": "Logs, metrics and traces",
    "alert_webhook": "Alerts without Prometheus",
    "admin_key": "Keys and webhooks",
}
# Wording of JSON schema's bounds.
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
}


def page() -> str:
    """The page with the tables as they should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(_tables()) + "\n\n" + END + after


def _tables() -> Iterator[str]:
    for name, schema in Settings.model_json_schema()["properties"].items():
        if name in SECTIONS:
            yield f"\n### {SECTIONS[name]}\n"
            yield "| variable | takes | default | what it is |"
            yield "| --- | --- | --- | --- |"
        cells = f"`{PREFIX}{name.upper()}`", _takes(schema), _default(schema)
        yield f"| {' | '.join(cells)} | {schema['description']} |"


def _takes(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type") or schema["anyOf"][0]["type"]  # of what may be missing
    if kind == "boolean":
        return "`true` or `false`"
    names = {"string": "text", "integer": "whole number", "number": "number"}
    bounds = (words.format(schema[bound]) for bound, words in BOUNDS.items() if bound in schema)
    return ", ".join((names[kind], *bounds))


def _default(schema: dict[str, Any]) -> str:
    default = schema["default"]
    if default in {None, ""}:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    PAGE.write_text(page())
