"""The schemas of resources that are not Kubernetes' own: KEDA's and the Prometheus operator's."""

from typing import Any


def fields(required: str, optional: str = "", **nested: Any) -> dict[str, Any]:
    """The schema of an object with these fields and no others."""
    names = [*required.split(), *optional.split(), *nested]
    properties = {name: nested.get(name, {}) for name in names}
    needed = required.split()
    return {"type": "object", "properties": properties, "required": needed} | {
        "additionalProperties": False
    }


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
POLICY = fields("type value periodSeconds", value={"type": "integer", "minimum": 1})
BEHAVIOR = fields("", "stabilizationWindowSeconds", policies=many(POLICY))
# From the references of KEDA and of the Prometheus operator, as far as they are used here: no
# package has the schemas of their resources.
SPECS: dict[str, dict[str, Any]] = {
    "ScaledObject": fields(
        "scaleTargetRef triggers",
        "minReplicaCount maxReplicaCount pollingInterval cooldownPeriod",
        scaleTargetRef=fields("name", "apiVersion kind"),
        fallback=fields("failureThreshold replicas", "behavior"),
        advanced=fields(
            "",
            horizontalPodAutoscalerConfig=fields(
                "", behavior=fields("", scaleUp=BEHAVIOR, scaleDown=BEHAVIOR)
            ),
        ),
        triggers=many(
            # A fallback works with averages only.
            fields(
                "type metadata",
                metricType={"const": "AverageValue"},
                metadata=TEXTS | {"required": ["serverAddress", "query", "threshold"]},
            )
        ),
    ),
    "ServiceMonitor": fields(
        "selector endpoints",
        selector=fields("matchLabels", matchLabels=TEXTS),
        endpoints=many(
            fields(
                "port",
                "path interval",
                authorization=fields("credentials", credentials=fields("name key")),
                relabelings=many(fields("sourceLabels targetLabel")),
            )
        ),
    ),
    "PrometheusRule": fields(
        "groups",
        groups=many(
            fields(
                "name rules",
                "interval",
                rules=many(fields("expr", "alert record for", labels=TEXTS, annotations=TEXTS)),
            )
        ),
    ),
}
OTHERS = {
    "ScaledObject": "keda.sh/v1alpha1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}
