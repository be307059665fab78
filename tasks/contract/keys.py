"""Every Redis key of Sluice, its type, its content, and who deletes it.

| key                    | type    | what                                  | deleted by            |
| ---------------------- | ------- | ------------------------------------- | --------------------- |
| job:{id}               | hash    | job (job.py), state, place, times     | TTL once SQL has it   |
| backlog:{model}:{lane} | zset    | queued job -> order of service        | whoever moves the job |
| suspects:{model}:{lane}| zset    | the same, of what may kill workers    | whoever moves the job |
| queue:{lane}:{tenant}  | zset    | its jobs in the backlog -> order      | whoever moves the job |
| turns:{model}:{lane}   | zset    | tenant with such jobs -> its service  | whoever moves the last|
| served:{lane}:{tenant} | string  | the service of a tenant without any   | TTL, submit           |
| level:{model}:{lane}   | string  | that of the last one that had some    | nobody: a few names   |
| delayed                | zset    | queued job -> us from when it may run | whoever moves the job |
| leases                 | zset    | running job -> lease expiry, us       | whoever moves the job |
| deadlines              | zset    | job -> us by which it must start      | claim, end            |
| celery:gen.{model}     | list    | tickets (celery_app.py), up to 256    | workers               |
| models                 | set     | models that have had a job            | nobody: a few names   |
| body_bytes             | hash    | model -> bytes of open jobs' bodies   | nobody: a few names   |
| key:{tenant}:{key}     | string  | fingerprint and job of a request      | TTL                   |
| claim:{token}          | string  | job and attempt that a claim got      | TTL                   |
| suspect:{worker}       | string  | job and attempt that may kill it      | TTL, clear            |
| service:{model}        | string  | mean time on the engine, us           | nobody: a few names   |
| tokens:{model}         | hash    | mean tokens of input and output       | nobody: a few names   |
| used:{subject}:{of}    | string  | requests or tokens of a minute, day.. | TTL                   |
| open:{subject}         | set     | its interactive jobs that are open    | end of the job        |
| waiting:{subject}      | set     | its jobs that wait                    | whoever moves the job |
| reserved:{job}         | string  | what it may cost, of whom, since when | whoever settles it    |
| held                   | zset    | job not queued yet -> us until when   | submit, reaper        |
| model_entries          | string  | models changed at run time, JSON      | nobody                |
| arrived:{model}        | string  | an interactive job has come lately    | TTL                   |
| paused                 | set     | models whose backlog is not served    | `sluice resume`       |
| ledger                 | stream  | changes not yet in SQL (ledger.py)    | maintenance           |
| run                    | string  | run of Redis, us when it was seen     | nobody                |
| celery:maintenance     | list    | tasks that are due (celery_app.py)    | maintenance           |
| maintenance            | string  | process that reaped last              | TTL                   |
| counts                 | hash    | what happened -> how often (counts.py)| nobody: few fields    |
| alerts                 | string  | conditions that hold (alerts.py)      | nobody: a few         |
| alerts:lock            | string  | which maintenance checks them now     | TTL                   |
| workers                | set     | workers that may be alive             | a reader, once dead   |
| worker:{id}            | hash    | model, slots, running, heartbeats     | TTL, maintenance      |
| log:{id}               | stream  | what the worker sent back (events.py) | TTL once SQL has it   |
| probe                  | string  | nothing: that Redis takes writes now  | TTL                   |
| relay:{process}        | channel | the same entries, for one API process | -                     |
| control:{worker}       | channel | id and attempt to stop, or `drain`    | -                     |

`log`, `probe` and the channels live on the bus, all else on the queue's Redis; both may be one.
A subject of limits is `key:{id}` or `tenant:{name}` (lua/limits.lua).
In `queue` and `served` {lane} is {model}:{lane}; names of models may have colons, tenants' not.
An open job's place is `backlog`, `suspects`, `delayed` or `leases`: docs/queue.md has the rules.
The scripts in lua/ know the keys by name (SCRIPT_NAMES): Redis Cluster is not supported.
"""

PREFIX = "sluice:"

CELERY_PREFIX = f"{PREFIX}celery:"
MODELS = f"{PREFIX}models"
LEASES = f"{PREFIX}leases"
DEADLINES = f"{PREFIX}deadlines"
DELAYED = f"{PREFIX}delayed"
PAUSED = f"{PREFIX}paused"
LEDGER = f"{PREFIX}ledger"
RUN = f"{PREFIX}run"
MAINTENANCE = f"{PREFIX}maintenance"
COUNTS = f"{PREFIX}counts"
ALERTS = f"{PREFIX}alerts"
ALERTS_LOCK = f"{PREFIX}alerts:lock"
WORKERS = f"{PREFIX}workers"
PROBE = f"{PREFIX}probe"
BODY_BYTES = f"{PREFIX}body_bytes"
BACKLOG_PREFIX = f"{PREFIX}backlog:"
SUSPECTS_PREFIX = f"{PREFIX}suspects:"
JOB_PREFIX = f"{PREFIX}job:"
LOG_PREFIX = f"{PREFIX}log:"
SERVICE_PREFIX = f"{PREFIX}service:"
TOKENS_PREFIX = f"{PREFIX}tokens:"
QUEUE_PREFIX = f"{PREFIX}queue:"
TURNS_PREFIX = f"{PREFIX}turns:"
SERVED_PREFIX = f"{PREFIX}served:"
LEVEL_PREFIX = f"{PREFIX}level:"
USED_PREFIX = f"{PREFIX}used:"
OPEN_PREFIX = f"{PREFIX}open:"
WAITING_PREFIX = f"{PREFIX}waiting:"
RESERVED_PREFIX = f"{PREFIX}reserved:"
HELD = f"{PREFIX}held"
MODEL_ENTRIES = f"{PREFIX}model_entries"
ARRIVED_PREFIX = f"{PREFIX}arrived:"
TICKETS_PREFIX = f"{CELERY_PREFIX}gen."

# The keys, or their beginnings, as constants of the scripts.
SCRIPT_NAMES = {
    "JOB": JOB_PREFIX,
    "BACKLOG": BACKLOG_PREFIX,
    "SUSPECTS": SUSPECTS_PREFIX,
    "QUEUE": QUEUE_PREFIX,
    "TURNS": TURNS_PREFIX,
    "SERVED": SERVED_PREFIX,
    "LEVEL": LEVEL_PREFIX,
    "USED": USED_PREFIX,
    "OPEN": OPEN_PREFIX,
    "WAITING": WAITING_PREFIX,
    "RESERVED": RESERVED_PREFIX,
    "HELD": HELD,
    "ARRIVED": ARRIVED_PREFIX,
    "SERVICE": SERVICE_PREFIX,
    "TOKENS": TOKENS_PREFIX,
    "DELAYED": DELAYED,
    "LEASES": LEASES,
    "DEADLINES": DEADLINES,
    "TICKETS": TICKETS_PREFIX,
    "MODELS": MODELS,
    "BODY_BYTES": BODY_BYTES,
    "PAUSED": PAUSED,
    "LEDGER": LEDGER,
    "RUN": RUN,
    "COUNTS": COUNTS,
    "WORKERS": WORKERS,
}


def backlog(model: str, lane: str) -> str:
    return f"{BACKLOG_PREFIX}{model}:{lane}"


def suspects(model: str, lane: str) -> str:
    return f"{SUSPECTS_PREFIX}{model}:{lane}"


def queue(model: str, lane: str, tenant: str) -> str:
    return f"{QUEUE_PREFIX}{model}:{lane}:{tenant}"


def turns(model: str, lane: str) -> str:
    return f"{TURNS_PREFIX}{model}:{lane}"


def served(model: str, lane: str, tenant: str) -> str:
    return f"{SERVED_PREFIX}{model}:{lane}:{tenant}"


def level(model: str, lane: str) -> str:
    return f"{LEVEL_PREFIX}{model}:{lane}"


def tokens(model: str) -> str:
    return TOKENS_PREFIX + model


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


def claim(token: str) -> str:
    return f"{PREFIX}claim:{token}"


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
