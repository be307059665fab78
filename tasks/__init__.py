"""What lies between the API and the workers: their contract, the queue, and its maintenance.

Open `contract/` first (what a job is, what a worker sends back), then `queue/` (a job's life in
Redis), then `maintenance/` (the ledger, webhooks, alerts, with SQL). Each imports only
those before it.
"""
