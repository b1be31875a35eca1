"""What an engine does, in Prometheus' text format."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cobra.serve.engine import percentile

if TYPE_CHECKING:
    from cobra.serve.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
QUANTILES = (0.5, 0.9, 0.99)


def render(engine: "Engine") -> bytes:
    """All metrics of an engine."""
    registry = CollectorRegistry()
    registry.register(_Collector(engine))
    return generate_latest(registry)


class _Collector:
    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, done, cache = self._engine, self._engine.counters, self._engine.cache
        for name, about, value in (
            ("requests", "Requests taken", done.requests),
            ("requests_refused", "Requests refused because too many were waiting", done.refused),
            ("requests_cancelled", "Requests whose client went away", done.cancelled),
            ("requests_failed", "Requests that ended with an error", done.failed),
            ("prompt_tokens", "Tokens of conversations", done.prompt_tokens),
            ("cached_tokens", "Of these, tokens that were not read again", done.cached_tokens),
            ("new_tokens", "Tokens of answers", done.new_tokens),
            ("images", "Images read", done.images),
            ("cache_hits", "Conversations whose beginning was known", cache.hits),
            ("cache_misses", "Conversations of which nothing was known", cache.misses),
            ("cache_evicted", "States that had to make room", cache.evicted),
        ):
            yield CounterMetricFamily(f"cobra_{name}", about, value)
        for name, about, value in (
            ("waiting", "Requests that wait for a slot", engine.num_waiting),
            ("running", "Answers that are being read or made", engine.num_running),
            ("slots", "Answers that can be made at a time", engine.slots.count),
            ("slot_bytes", "Bytes of the slots' states", engine.slots.nbytes),
            ("cache_states", "States kept", len(cache)),
            ("cache_bytes", "Bytes of the states kept", cache.nbytes),
            ("cache_budget_bytes", "Bytes that states may take", cache.budget),
        ):
            yield GaugeMetricFamily(f"cobra_{name}", about, value)
        for name, about, values in (
            ("first_token_seconds", "From a request to its first token, of the last 1,024", done.first_tokens),
            ("token_gap_seconds", "From a token to the next of its answer, of the last 4,096", done.gaps),
        ):
            family = GaugeMetricFamily(f"cobra_{name}", about, labels=["quantile"])
            for share in QUANTILES:
                family.add_metric([str(share)], percentile(values, share))
            yield family
