"""How many front ends a worker has that nobody gave a number."""

from typing import Any

import pytest

from gpu_worker.engines.engine import count_front_ends
from tasks.contract.models import Model


@pytest.mark.parametrize(
    ("cores", "has_gpu", "entry", "count"),
    [
        (16, True, {}, 2),
        (64, True, {"slots": 1024}, 2),
        (8, True, {}, 2),
        (7, True, {}, 1),
        (2, True, {}, 1),
        (16, False, {}, 1),
        (16, True, {"slots": 63}, 1),
        (16, True, {"engine": "sim"}, 1),
        (16, True, {"engine": "remote", "source": "http://127.0.0.1:1"}, 1),
        (16, True, {"args": {"data_parallel_size": 2}}, 1),
        (16, True, {"args": {"enable-fault-tolerance": True}}, 1),
        (2, False, {"frontends": 4}, 4),
        (16, True, {"frontends": 1}, 1),
    ],
)
def test_an_engine_on_a_gpu_with_cores_and_slots_has_two(
    cores: int, has_gpu: bool, entry: dict[str, Any], count: int
) -> None:
    model = Model(**{"name": "m", "source": "s", "slots": 64} | entry)
    assert count_front_ends(model, cores, has_gpu) == count
