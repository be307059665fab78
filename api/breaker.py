"""How a model does lately, by counts that only grow: whether it fails, and how fast it is."""

from collections import deque


class Breaker:
    """Opens when most of a model's jobs fail in its engine; then lets one request a second try.

    M. Nygard's circuit breaker ("Release It!"), fed with the counts of the whole deployment.
    """

    WINDOW_S = 30.0
    LEAST_FAILURES = 5
    OPEN_S = 10.0
    PROBE_S = 1.0

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()
        self._open_since_s: float | None = None
        self._probed_s = 0.0

    def note(self, completed: int, failed: int, now_s: float) -> None:
        """Takes the counts since Redis began."""
        if self._seen and completed + failed < sum(self._seen[-1][1:]):
            self._seen.clear()  # Redis has begun anew
        last = self._seen[-1] if self._seen else (now_s, completed, failed)
        self._seen.append((now_s, completed, failed))
        while self._seen[0][0] < now_s - self.WINDOW_S:
            self._seen.popleft()
        if self._open_since_s is None:
            _, completed_then, failed_then = self._seen[0]
            bad = failed - failed_then
            if bad >= self.LEAST_FAILURES and bad > completed - completed_then:
                self._open_since_s = now_s
        elif failed > last[2]:
            self._open_since_s = now_s  # a probe has failed
        elif completed > last[1]:
            self._open_since_s = None
            self._seen.clear()

    def is_open(self, now_s: float) -> bool:
        """Whether requests are to go elsewhere; now and then one is not, and tries."""
        if self._open_since_s is None:
            return False
        if now_s < max(self._open_since_s + self.OPEN_S, self._probed_s + self.PROBE_S):
            return True
        self._probed_s = now_s
        return False


class Rate:
    """How many a second there were, the last ten seconds or so."""

    SHARE = 0.1

    def __init__(self) -> None:
        self.per_s = 0.0
        self._last: tuple[int, float] | None = None

    def note(self, count: int, now_s: float) -> None:
        """Takes the count since Redis began, about once a second."""
        if self._last and count >= self._last[0] and now_s > self._last[1]:
            latest = (count - self._last[0]) / (now_s - self._last[1])
            self.per_s += self.SHARE * (latest - self.per_s)
        self._last = (count, now_s)
