"""A budget holds, whatever comes at once and whoever dies meanwhile."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
import requests

from bench.stack import Stack, await_that, running
from db import migrate
from tasks.contract import keys
from tasks.contract.access import DEFAULT_TENANT, KeySpec, TenantSpec
from tasks.maintenance import api_keys
from tests.faults.conftest import LEASE_S, SLOW_SIM, Fault
from tests.test_jobs import ENDPOINT, call
from tests.test_key_limits import left_places

pytestmark = pytest.mark.timeout(120)

REQUESTS, AT_ONCE = 500, 100
BODY = orjson.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40})
# Of ten that are admitted at once: a token for each byte of them, and their answers.
BUDGET = 10 * (len(BODY) + 40)


def test_500_requests_at_once_do_not_overrun_a_budget_for_ten(home: Any, fault: Fault) -> None:
    stack = Stack(home, [SLOW_SIM], lease_s=LEASE_S)
    migrate(stack.database_url)
    api_keys.set_tenant(stack.database_url, DEFAULT_TENANT, TenantSpec())
    spec = KeySpec.model_validate({"name": "k", "limits": {"tokens_per_day": BUDGET}})
    key = api_keys.create(stack.database_url, spec)
    headers = {"Authorization": f"Bearer {key['key']}", "Content-Type": "application/json"}
    with running(stack, workers=2):

        def ask(_: int) -> requests.Response:
            return call(stack, "POST", ENDPOINT, data=BODY, headers=headers)

        def kill_one() -> None:
            await_that(lambda: all(stack.jobs_of(worker) for worker in stack.workers))
            fault.inflict("SIGKILL worker")
            stack.workers[0].kill()

        killing = threading.Thread(target=kill_one)
        killing.start()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(ask, range(REQUESTS)))
        killing.join()
        served = [answer.json()["usage"] for answer in answers if answer.ok]
        refused = [answer for answer in answers if not answer.ok]
        assert len(served) >= 10
        assert {answer.status_code for answer in refused} == {429}
        codes = {answer.json()["error"]["code"] for answer in refused}
        # What is only reserved may be there again.
        assert codes <= {"insufficient_quota", "rate_limit_exceeded"}
        tokens = sum(usage["total_tokens"] for usage in served)
        assert tokens <= BUDGET
        await_that(lambda: not left_places(stack.redis))
        (day,) = stack.redis.keys(f"{keys.USED_PREFIX}key:{key['id']}:day:*")
        # Nothing is charged twice, and nothing is left out.
        assert int(stack.redis.get(day) or 0) == tokens
