"""Every Redis key of Sluice, its type, its content, and who deletes it.

| key                    | type    | what                                  | deleted by            |
| ---------------------- | ------- | ------------------------------------- | --------------------- |
| backlog:{model}:{lane} | zset    | queued job -> order of service        | claim, cancel         |
| celery:gen.{model}     | list    | tickets (app.py)                      | workers               |
| models                 | set     | models that have had a job            | nobody: a few names   |
| job:{id}               | hash    | job (message.py), state, times        | TTL                   |
| deadlines              | zset    | job -> us by which it must start      | claim, cancel, reap   |
| key:{tenant}:{key}     | string  | fingerprint and job of a request      | TTL                   |
| service:{model}        | string  | mean time on the engine, us           | nobody: a few names   |
| leases                 | zset    | running job -> lease expiry, us       | finish, requeue, reap |
| delayed                | zset    | failed job -> us of its next try      | reap, cancel          |
| paused                 | set     | models whose backlog is not served    | `sluice resume`       |
| suspect:{worker}       | string  | job that may kill that worker         | TTL                   |
| ledger                 | stream  | changes not yet in SQL (ledger.py)    | maintenance           |
| maintenance            | string  | process that reaped last              | TTL                   |
| counts                 | hash    | what happened -> how often (counts.py)| nobody: few fields    |
| alerts                 | string  | conditions that hold (alerts.py)      | nobody: a few         |
| alerts:lock            | string  | which maintenance looks at them now   | TTL                   |
| workers                | set     | workers that may be alive             | whoever finds it dead |
| worker:{id}            | hash    | model, slots, running, waiting        | TTL                   |
| log:{id}               | stream  | what the worker sent back (events.py) | TTL                   |
| relay:{process}        | channel | the same entries, for one API process | -                     |
| control:{worker}       | channel | id of a job to stop, or `drain`       | -                     |

`log` and the channels live on the bus, all else on the queue's Redis; both may be one.
The scripts in lua/ build keys of jobs and logs themselves: Redis Cluster is not supported.
"""

PREFIX = "sluice:"

CELERY_PREFIX = f"{PREFIX}celery:"
MODELS = f"{PREFIX}models"
LEASES = f"{PREFIX}leases"
DEADLINES = f"{PREFIX}deadlines"
DELAYED = f"{PREFIX}delayed"
PAUSED = f"{PREFIX}paused"
LEDGER = f"{PREFIX}ledger"
MAINTENANCE = f"{PREFIX}maintenance"
COUNTS = f"{PREFIX}counts"
ALERTS = f"{PREFIX}alerts"
ALERTS_LOCK = f"{PREFIX}alerts:lock"
WORKERS = f"{PREFIX}workers"
BACKLOG_PREFIX = f"{PREFIX}backlog:"
JOB_PREFIX = f"{PREFIX}job:"
LOG_PREFIX = f"{PREFIX}log:"
SERVICE_PREFIX = f"{PREFIX}service:"


def backlog(model: str, lane: str) -> str:
    return f"{BACKLOG_PREFIX}{model}:{lane}"


def job(job_id: str) -> str:
    return JOB_PREFIX + job_id


def log(job_id: str) -> str:
    return LOG_PREFIX + job_id


def idempotency(tenant: str, key: str) -> str:
    return f"{PREFIX}key:{tenant}:{key}"


def service(model: str) -> str:
    return SERVICE_PREFIX + model


def worker(worker_id: str) -> str:
    return f"{PREFIX}worker:{worker_id}"


def suspect(worker_id: str) -> str:
    return f"{PREFIX}suspect:{worker_id}"


def relay(process: str) -> str:
    return f"{PREFIX}relay:{process}"


def control(worker_id: str) -> str:
    return f"{PREFIX}control:{worker_id}"


def ticket_queue(model: str) -> str:
    """Name of the Celery queue that holds the model's tickets."""
    return f"gen.{model}"


def tickets(model: str) -> str:
    """That queue as Celery keeps it in Redis."""
    return CELERY_PREFIX + ticket_queue(model)
