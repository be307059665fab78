"""When a running job is late: with its first token, with its next one, or with its end."""

import asyncio
from collections.abc import Callable

from tasks.contract.errors import SluiceError
from tasks.contract.job import Claim
from tasks.contract.job_errors import FirstTokenTimeoutError, JobTimeoutError, NextTokenTimeoutError
from tasks.contract.models import Timeouts

# Looks in the shortest time there is; what is late is noticed by a twentieth of it later.
LOOKS = 20
LONGEST_SLEEP_S = 3600.0


async def wait_until_late(
    claim: Claim, timeouts: Timeouts, progress: Callable[[], object]
) -> SluiceError:
    """Waits until the job is late, and returns as what it is to fail.

    It looks at `progress` now and then, as a note of each token would cost more than the rest of
    what is done for one.
    """
    loop = asyncio.get_running_loop()
    begun_s = seen_s = loop.time()
    ends = [limit_s for limit_s in (timeouts.total_s, claim.job.timeout_s) if limit_s is not None]
    total_s = min(ends, default=float("inf"))
    end_s = begun_s + total_s - claim.queue_ms / 1000
    first_s = timeouts.first_token_s or float("inf")
    next_s = timeouts.between_tokens_s or float("inf")
    beginning = seen = progress()
    while True:
        now_s = loop.time()
        if (found := progress()) != seen:
            seen, seen_s = found, now_s
        has_begun = seen != beginning
        late_s = seen_s + next_s if has_begun else begun_s + first_s
        if now_s >= end_s:
            return JobTimeoutError(total_s)
        if now_s >= late_s:
            return NextTokenTimeoutError(next_s) if has_begun else FirstTokenTimeoutError(first_s)
        look_s = min(first_s, next_s, LOOKS * LONGEST_SLEEP_S) / LOOKS
        await asyncio.sleep(min(end_s - now_s, late_s - now_s, look_s))
