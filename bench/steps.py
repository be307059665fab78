"""Which step of a request's way a sample of a process belongs to, as py-spy records samples.

A sample is a stack of frames; its step is that of the innermost frame which a step names, so what a
library does counts for whoever called it.
"""

from collections import Counter
from collections.abc import Iterable

OTHER = "other"
# By process: the steps from POST to the client's byte, and what is in a frame's path.
STEPS: dict[str, dict[str, tuple[str, ...]]] = {
    "api": {
        "log lines": ("/logging/__init__.py", "/structlog/", "/tasks/contract/logs.py"),
        "count": ("/prometheus_client/", "/api/instruments.py"),
        "read and check the request": ("/api/intake.py", "/api/engine_request.py"),
        "queue the job": ("/tasks/queue/backlog.py", "/api/acceptance.py"),
        "relay its events": ("/api/relay.py", "/tasks/queue/token_log.py", "/api/encoders/"),
        "write to clients": ("/gunicorn/", "/api/gunicorn_worker.py"),
        "routes": ("/api/", "/flask/", "/werkzeug/"),
    },
    "worker": {
        "log lines": ("/logging/__init__.py", "/structlog/", "/tasks/contract/logs.py"),
        "claim and finish": ("/tasks/queue/backlog.py", "/gpu_worker/claims.py"),
        "publish events": ("/gpu_worker/publisher.py", "/tasks/queue/token_log.py"),
        "note tokens for a replay": ("/gpu_worker/replay_log.py",),
        "count": ("/prometheus_client/", "/gpu_worker/metrics.py"),
        "run the job": ("/gpu_worker/runner.py", "/gpu_worker/running.py"),
        "leases and beats": ("/gpu_worker/heartbeat.py",),
        "engine: FastAPI, Starlette": ("/fastapi/", "/starlette/"),
        "engine: chats": ("/vllm/entrypoints/",),
        "engine: outputs": ("/vllm/v1/engine/",),
        "engine: other": ("/vllm/", "/gpu_worker/engines/"),
        "Celery": ("/celery/", "/kombu/", "/tasks/queue/celery_worker.py"),
        "worker": ("/gpu_worker/",),
    },
    "maintenance": {
        "record": ("/tasks/maintenance/", "/db/", "/sqlalchemy/"),
        "Celery": ("/celery/", "/kombu/"),
    },
}


def step_of(frames: list[str], role: str) -> str:
    """The step of a stack, whose outermost frame is the first."""
    for frame in reversed(frames):
        for step, paths in STEPS[role].items():
            if any(path in frame for path in paths):
                return step
    return OTHER


def count_steps(lines: Iterable[str], role: str) -> Counter[str]:
    """Samples by step, from py-spy's format `raw`: `outer;inner COUNT`."""
    counted: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rstrip().rpartition(" ")
        if stack and count.isdigit():
            counted[step_of(stack.split(";"), role)] += int(count)
    return counted
