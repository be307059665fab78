"""Grafana's dashboards, made by code: `python -m deploy.dashboards` writes deploy/grafana/*.json.

What the metrics mean is in docs/metrics.md; each panel's description says what to think of it.
"""
