"""Alerts without Prometheus: thresholds from the settings, sent to SLUICE_ALERT_WEBHOOK.

In the body of Alertmanager's webhooks (version 4), so its receivers take them:
https://prometheus.io/docs/alerting/latest/configuration/#webhook_config. The rules for Prometheus
(deploy/prometheus) see more; with Prometheus this module is not needed.
"""

import hashlib
import logging
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson

from tasks.contract import keys
from tasks.contract.models import Catalog
from tasks.contract.settings import Settings
from tasks.queue.backlog import Backlog
from tasks.queue.problems import find_problems
from tasks.queue.statistics import read_stats

log = logging.getLogger(__name__)

# The problems that are sent, as docs/operations.md promises.
SENT = "SluiceQueueDeep", "SluiceQueueOld", "SluiceNoWorker"
# A condition that ends sooner does not alert.
HOLD_S = 10
REPEAT_S = 4 * 3600
TIMEOUT_S = 10.0
_NEVER = "0001-01-01T00:00:00Z"


@dataclass
class Alert:
    """A condition that holds, or held until `ended_s`; times in s since the epoch."""

    name: str
    model: str
    severity: str
    summary: str
    since_s: float
    told_s: float = 0.0
    """When it was last sent as firing; 0: not yet."""
    ended_s: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.name} {self.model}"

    @property
    def status(self) -> str:
        return "resolved" if self.ended_s else "firing"

    def is_due(self, now_s: float) -> bool:
        """Whether it is to be sent now."""
        if self.ended_s:
            return self.told_s > 0
        return now_s - self.since_s >= HOLD_S and now_s - self.told_s >= REPEAT_S

    def as_alertmanager(self) -> dict[str, Any]:
        labels = {"alertname": self.name, "model": self.model, "severity": self.severity}
        return {
            "status": self.status,
            "labels": labels,
            "annotations": {
                "summary": self.summary,
                "runbook": f"docs/operations.md#{self.name.lower()}",
            },
            "startsAt": _moment(self.since_s),
            "endsAt": _moment(self.ended_s) if self.ended_s else _NEVER,
            "generatorURL": "",
            "fingerprint": hashlib.sha256(self.key.encode()).hexdigest()[:16],
        }


class Alerter:
    """Evaluates alerts, keeps their state in Redis, sends them; one process at a time does so."""

    def __init__(self, backlog: Backlog, catalog: Catalog, settings: Settings) -> None:
        self._backlog = backlog
        self._redis = backlog.redis
        self._models = [model.name for model in catalog.models]
        self._settings = settings

    def check(self) -> None:
        """One round.

        Raises:
            RedisError: Redis does not answer.
        """
        turn = self._redis.lock(keys.ALERTS_LOCK, timeout=3 * TIMEOUT_S, blocking=False)
        if not turn.acquire():
            return
        try:
            self._check()
        finally:
            turn.release()

    def _check(self) -> None:
        now_s = float(self._redis.time()[0])
        stats = read_stats(self._backlog, self._models)
        alerts = self._load()
        problems = find_problems(stats, self._settings)
        current = [Alert(p.name, p.model, p.severity, f"{p.what}.", now_s) for p in problems]
        holding = {alert.key: alert for alert in current if alert.name in SENT}
        for key, alert in alerts.items():
            if key not in holding and not alert.ended_s:
                alert.ended_s = now_s
        for key, alert in holding.items():
            known = alerts.get(key)
            if known and not known.ended_s:
                known.summary = alert.summary
            else:
                alerts[key] = alert
        due = [alert for alert in alerts.values() if alert.is_due(now_s)]
        if due and self._send(due):
            for alert in due:
                alert.told_s = 0.0 if alert.ended_s else now_s
        self._save(alerts)

    def _load(self) -> dict[str, Alert]:
        stored: Any = self._redis.get(keys.ALERTS)
        return {alert.key: alert for alert in (Alert(**a) for a in orjson.loads(stored or b"[]"))}

    def _save(self, alerts: dict[str, Alert]) -> None:
        kept = [asdict(a) for a in alerts.values() if not a.ended_s or a.told_s]
        self._redis.set(keys.ALERTS, orjson.dumps(kept))

    def _send(self, due: list[Alert]) -> bool:
        """Whether the receiver accepted them; if not, they are sent again in the next round."""
        is_firing = any(not alert.ended_s for alert in due)
        body = {
            "version": "4",
            "groupKey": "sluice",
            "truncatedAlerts": 0,
            "status": "firing" if is_firing else "resolved",
            "receiver": "sluice",
            "groupLabels": {},
            "commonLabels": {},
            "commonAnnotations": {},
            "externalURL": "",
            "alerts": [alert.as_alertmanager() for alert in due],
        }
        try:
            answer = httpx.post(
                self._settings.alert_webhook, json=body, timeout=TIMEOUT_S, trust_env=False
            )
            answer.raise_for_status()
        except httpx.HTTPError as failed:
            # Its URL may hold a secret.
            log.error("alerts not delivered, to be sent again: %s", type(failed).__name__)
            return False
        for alert in due:
            about = {"alert": alert.name, "model": alert.model}
            log.warning("alert %s: %s", alert.status, alert.summary, extra=about)
        return True


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
