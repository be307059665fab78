"""How are the engines? Sluice's workers, and vLLM within them."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.dashboards.panels import Panel, Queries, bad_from, board, graph, number
from deploy.dashboards.promql import of, or_zero, own, quantile, rate, same
from deploy.dashboards.shared import KV_CACHE, SLOTS, USED, kv_cache

WAITING = same(of("sluice_engine_waiting"), "model")


def made() -> Dashboard:
    """The dashboard of the workers and their engines."""
    return board(
        "sluice-workers",
        "Sluice: workers",
        "How are the engines? Sluice's workers, and vLLM within them.",
        {
            "": _now(),
            "Workers, as their heartbeats show them": _fleet(),
            "What each worker does": _each(),
            "vLLM: requests": _vllm_requests(),
            "vLLM: latency": _vllm_latency(),
            "vLLM: work": _vllm_work(),
        },
    )


def _or_none(query: str) -> str:
    """0 when no worker lives and Redis says so."""
    return or_zero(query, while_there="sluice_leases")


def _of_state(state: str) -> str:
    workers = same(of("sluice_workers", f'state="{state}"'), "model, state")
    return _or_none(f"sum({workers})")


def _now() -> list[Panel]:
    return [
        number(
            "Workers serving",
            "Workers that take jobs: without any, all jobs wait.",
            "short",
            _of_state("serving"),
        ),
        number(
            "Workers draining",
            "Workers that end what they run and stop: normal while you replace them.",
            "short",
            _of_state("draining"),
        ),
        number(
            "Slots",
            "Requests that the serving workers take at once: what you have to give.",
            "short",
            _or_none(f"sum({SLOTS})"),
        ),
        number(
            "Slots used",
            "Share of the slots: at 100 % the next job waits in the backlog.",
            "percentunit",
            f"sum({USED}) / sum({SLOTS})",
            bad_from(0.8, 1),
        ),
        number(
            "Waiting inside engines",
            "Requests that a worker has taken and its engine has no room for: above 0 for long, "
            "set fewer slots.",
            "short",
            _or_none(f"sum({WAITING})"),
            bad_from(1, 20),
        ),
        number(
            "KV cache used",
            "Of the fullest worker: near 100 % vLLM preempts requests and computes them again.",
            "percentunit",
            f"max({KV_CACHE})",
            bad_from(0.8, 0.95),
        ),
    ]


def _fleet() -> list[Panel]:
    return [
        graph(
            "Workers",
            "A fall without a drain is a worker that died: its jobs go on elsewhere, its slots "
            "are missing.",
            "short",
            {"{{model}} {{state}}": same(of("sluice_workers"), "model, state")},
        ),
        graph(
            "Slots, by model",
            "When what is used touches the total, the model's jobs wait in the backlog.",
            "short",
            {"{{model}} used": USED, "{{model}} total": SLOTS},
        ),
        graph(
            "Waiting inside engines, by model",
            "Requests that engines have no room for yet: above 0 for long, set fewer slots.",
            "short",
            {"{{model}}": WAITING},
        ),
        kv_cache(),
    ]


def _by_worker(query: str) -> Queries:
    return {"{{worker}}": query}


def _p95(histogram: str) -> Queries:
    return _by_worker(quantile(0.95, of(f"{histogram}_bucket"), "worker"))


def _rate(counter: str, *more: str) -> Queries:
    return _by_worker(own(rate(of(counter, *more)), "worker"))


def _each() -> list[Panel]:
    return [
        graph(
            "Tokens written per second, by worker",
            "Workers of one model should be alike: one far below the others is sick or idle.",
            "short",
            _rate("sluice_tokens_total", 'type="output"'),
        ),
        graph(
            "Between two outputs, p95, by worker",
            "Gaps in the streams as clients see them: one worker above the others is overloaded "
            "or its GPU throttles.",
            "s",
            _p95("sluice_inter_token_latency_seconds"),
            bad_from(0.2, 1),
        ),
        graph(
            "Whole requests, p95, by worker",
            "From acceptance to the end, the wait in the queue included.",
            "s",
            _p95("sluice_request_duration_seconds"),
        ),
    ]


def _vllm_requests() -> list[Panel]:
    return [
        graph(
            "Running",
            "Requests in vLLM's current batch: more of them mean more tokens per second and a "
            "slower pace of each.",
            "short",
            _by_worker(own(of("vllm:num_requests_running"), "worker")),
        ),
        graph(
            "Waiting",
            "Requests that vLLM has not begun or has preempted: above 0 for long, set fewer slots.",
            "short",
            _by_worker(own(of("vllm:num_requests_waiting"), "worker")),
        ),
        graph(
            "KV cache used",
            "Near 100 % vLLM preempts requests, as the next panel shows.",
            "percentunit",
            _by_worker(f"max by (worker) ({of('vllm:kv_cache_usage_perc')})"),
            bad_from(0.8, 0.95),
        ),
        graph(
            "Preempted per second",
            "Requests thrown out of the KV cache to be computed again: wasted work, set fewer "
            "slots or a shorter context.",
            "short",
            _rate("vllm:num_preemptions_total"),
        ),
    ]


def _vllm_latency() -> list[Panel]:
    return [
        graph(
            "Time to first token in vLLM, p95",
            "Without the wait in Sluice's backlog: when only this rises, prompts are long or the "
            "engine is full.",
            "s",
            _p95("vllm:time_to_first_token_seconds"),
            bad_from(2, 8),
        ),
        graph(
            "Between two tokens in vLLM, p95",
            "The engine's own pace: when clients see larger gaps than this, look at the network, "
            "Redis and the API.",
            "s",
            _p95("vllm:inter_token_latency_seconds"),
            bad_from(0.1, 0.2),
        ),
        graph(
            "Wait inside vLLM, p95",
            "From its acceptance to the first step: should be near 0, the place to wait is the "
            "backlog.",
            "s",
            _p95("vllm:request_queue_time_seconds"),
        ),
    ]


def _vllm_work() -> list[Panel]:
    hits = own(rate(of("vllm:prefix_cache_hits_total")), "worker")
    asked = own(rate(of("vllm:prefix_cache_queries_total")), "worker")
    return [
        graph(
            "Tokens generated per second",
            "Throughput of decoding: level while requests wait means that the GPU is at its limit.",
            "short",
            _rate("vllm:generation_tokens_total"),
        ),
        graph(
            "Prompt tokens per second",
            "Throughput of prefills: bursts of it delay the streams that run beside them.",
            "short",
            _rate("vllm:prompt_tokens_total"),
        ),
        graph(
            "Prompt tokens found in the cache",
            "Share of prompt tokens that need no prefill: a fall makes first tokens later.",
            "percentunit",
            _by_worker(f"{hits} / {asked}"),
        ),
        graph(
            "Requests ended per second, by reason",
            "stop is an answer's own end, length a limit that cut it, abort a client that left or "
            "a job that was cancelled.",
            "short",
            {"{{finished_reason}}": own(rate(of("vllm:request_success_total")), "finished_reason")},
        ),
    ]
