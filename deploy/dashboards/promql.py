"""The forms of query that the dashboards use.

Queue, jobs and workers are the same from each API: the greatest of the APIs counts. HTTP is each
API's own, latencies and `vllm:*` are each worker's own: these are added up.
"""


def same(metric: str, labels: str, by: str | None = None) -> str:
    """What every API tells alike, summed up to the labels `by`; by default to all of its own."""
    told = f"max by ({labels}) ({metric})"
    return told if by is None else f"sum by ({by}) ({told})"


def own(metric: str, by: str) -> str:
    """What each process tells of itself, summed up."""
    return f"sum by ({by}) ({metric})"


def of(metric: str, *more: str) -> str:
    """The metric of the chosen models, narrowed by more matchers."""
    label = "model_name" if metric.startswith("vllm:") else "model"
    matchers = ", ".join([f'{label}=~"$model"', *more])
    return f"{metric}{{{matchers}}}"


def rate(metric: str) -> str:
    """The counter's increase per second."""
    return f"rate({metric}[$__rate_interval])"


def increase(metric: str) -> str:
    """The counter's increase between two points of the graph."""
    return f"increase({metric}[$__rate_interval])"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """The quantile of a histogram, which is given as `metric_bucket{…}`."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {own(rate(histogram), labels)})"


def quantiles(histogram: str, *shares: float, by: str = "") -> dict[str, str]:
    """Quantiles by their legends; `by` is one label."""
    legend = f"{{{{{by}}}}} p" if by else "p"
    return {f"{legend}{share * 100:g}": quantile(share, histogram, by) for share in shares}


def or_zero(query: str, label: str = "", while_there: str = "sluice_redis_up") -> str:
    """0 for what has not happened yet, unless the other metric is gone too: silence is no news."""
    zero = f"0 * max({while_there})"
    if label:
        zero = f'label_replace({zero}, "{label}", "none", "", "")'
    return f"{query} or on() {zero}"
