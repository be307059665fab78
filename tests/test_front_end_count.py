"""How many front ends a worker has that nobody gave a number."""

from typing import Any

import pytest

from gpu_worker.engines.engine import count_front_ends
from tasks.contract.models import Model
from tasks.contract.settings import Settings

ANY_PORT = str(Settings.model_fields["metrics_bind"].default)


@pytest.mark.parametrize(
    ("cores_per_gpu", "entry", "count"),
    [
        (16, {}, 2),
        (64, {"slots": 1024}, 2),
        (8, {}, 2),
        (7, {}, 1),
        (0, {}, 1),
        (16, {"slots": 127}, 1),
        (16, {"engine": "sim"}, 1),
        (16, {"engine": "remote", "source": "http://127.0.0.1:1"}, 1),
        (16, {"args": {"data_parallel_size": 2}}, 1),
        (16, {"args": {"enable-fault-tolerance": True}}, 1),
        (0, {"frontends": 4}, 4),
        (16, {"frontends": 1}, 1),
    ],
)
def test_vllm_on_a_gpu_with_cores_and_slots_has_two(
    cores_per_gpu: int, entry: dict[str, Any], count: int
) -> None:
    model = Model(**{"name": "m", "source": "s", "slots": 128} | entry)
    assert count_front_ends(model, cores_per_gpu, ANY_PORT) == count


def test_metrics_at_a_given_port_are_of_one_process() -> None:
    model = Model(name="m", source="s", slots=128)
    assert count_front_ends(model, 16, "0.0.0.0:9100") == 1
