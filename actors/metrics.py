"""Every metric of the system, defined once. Ray exports them as `ray_llmi_...` for Prometheus."""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]

_COUNTERS = {
    "rows_in": ("rows that a stage claimed", ("stage",)),
    "rows_out": ("rows that a stage put", ("stage",)),
    "failures": ("failures by class: infrastructure, data, judge, call, refused (too many waited)", ("stage", "kind")),
    "tokens": ("tokens sampled or trained", ("stage",)),
    "cache_hits": ("calls that a tool server answered from its cache", ("stage",)),
    "cost_dollars": ("what a tool's calls cost, in US dollars", ("stage",)),
    "busy_seconds": ("seconds in which a stage had work", ("stage",)),
}
_GAUGES = {
    "queue_length": ("rows that wait for a stage", ("stage",)),
    "staleness": ("optimiser steps between the policy that wrote and the one that is trained", ()),
    "tokens_per_second": ("tokens a second of a stage, over its last report", ("stage",)),
    "under_way": ("calls that a replica of a tool runs or holds", ("stage",)),
    "reward": ("mean reward of the last optimiser step", ()),
    "policy_version": ("optimiser steps of the policy in use", ("stage",)),
}
_HISTOGRAMS = {"seconds": ("seconds a row, batch or call took", ("stage",))}


@cache
def _metric(name: str) -> Counter | Gauge | Histogram:
    if name in _COUNTERS:
        what, tags = _COUNTERS[name]
        return Counter(f"llmi_{name}", what, tag_keys=tags)
    if name in _GAUGES:
        what, tags = _GAUGES[name]
        return Gauge(f"llmi_{name}", what, tag_keys=tags)
    what, tags = _HISTOGRAMS[name]
    return Histogram(f"llmi_{name}", what, boundaries=_SECONDS, tag_keys=tags)


def count(name: str, value: float = 1.0, **tags: str) -> None:
    """Add to a counter."""
    if value > 0:
        _metric(name).inc(value, tags)


def gauge(name: str, value: float, **tags: str) -> None:
    """Set a gauge."""
    _metric(name).set(value, tags)


def observe(name: str, value: float, **tags: str) -> None:
    """Add one observation to a histogram."""
    _metric(name).observe(value, tags)
