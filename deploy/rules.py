"""The alerts of deploy/prometheus as a PrometheusRule, which the Prometheus operator reads.

`make docs` writes it: kustomize cannot put a file of YAML into a field.
"""

import json
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parent
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
RULE = DEPLOY / "kubernetes" / "overlays" / "monitoring" / "rules.yaml"
HEADER = "# Made of deploy/prometheus/alerts.yml: `make docs`.\n"


class _Dumper(yaml.SafeDumper):
    """Expressions stay on lines of their own."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def rule() -> str:
    """The file as it should be."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "sluice"},
        "spec": json.loads(json.dumps(groups)),  # what anchors share, each has for itself
    }
    return HEADER + yaml.dump(resource, Dumper=_Dumper, sort_keys=False, width=120)


if __name__ == "__main__":
    RULE.write_text(rule(), encoding="utf-8")
