"""What a worker measures of its streams reaches their series whole."""

import math
import time

from prometheus_client import REGISTRY

from gpu_worker.metrics import Meter
from tasks.contract.job import Claim, Job

SERIES = "sluice_inter_token_latency_seconds"


def _stream(model: str) -> Meter:
    return Meter(Claim(Job(f"job_{model}", model, "/v1/completions", b"{}"), 1, 0, 0, 3))


def _value(model: str, part: str, **labels: str) -> float:
    labels |= {"model": model, "lane": "interactive"}
    return REGISTRY.get_sample_value(f"{SERIES}_{part}", labels) or 0


def test_each_time_between_two_outputs_is_counted_when_the_worker_is_done_with_the_job() -> None:
    begun_s = time.monotonic()
    streams = [_stream("counted") for _ in range(3)]
    for tokens in range(1, 101):
        for stream in streams:
            stream.output(tokens)
    for stream in streams:
        stream.close()
    took_s = time.monotonic() - begun_s
    assert _value("counted", "count") == _value("counted", "bucket", le="+Inf") == 3 * 99
    assert 0 < _value("counted", "sum") <= 3 * took_s
    spent_s = sum(stream.last_s - stream.first_s for stream in streams)
    assert math.isclose(_value("counted", "sum"), spent_s, rel_tol=1e-6)


def test_a_stream_that_goes_on_is_counted_on_its_way() -> None:
    stream = _stream("on its way")
    begun_s, tokens = time.monotonic(), 0
    while not _value("on its way", "count"):
        tokens += 1
        stream.output(tokens)
        assert time.monotonic() - begun_s < 60
