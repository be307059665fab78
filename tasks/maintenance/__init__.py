"""Maintains the queue: expired leases, records in SQL, lost jobs, webhooks, alerts.

Imports `tasks.queue` and `db`. Open `main.py` first (what runs how often).
"""
