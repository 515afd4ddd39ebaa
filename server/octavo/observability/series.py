"""Series as prometheus_client has them not: told in groups, and added up over processes. Knows no
metric by name."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import prometheus_client
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import HistogramMetricFamily


class GroupedHistogram:
    """A histogram of one series, told how often each value was observed: what happens to every
    request of a step costs a call for the step."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        registry: CollectorRegistry,
        buckets: Sequence[float] = (),
    ) -> None:
        self._name, self._help, self._label_names = name, text, labels
        self._label_values: list[str] = []
        self._buckets = tuple(buckets)
        self._counts = [0] * (len(self._buckets) + 1)
        self._sum = 0.0
        registry.register(self)  # collect() is all it needs

    def labels(self, **labels: str) -> GroupedHistogram:
        """The series; there is one."""
        self._label_values = [labels[name] for name in self._label_names]
        return self

    def observe(self, value: float, count: int) -> None:
        self._counts[bisect.bisect_left(self._buckets, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._label_names)
        bounds = [*map(prometheus_client.utils.floatToGoString, self._buckets), "+Inf"]
        counts = itertools.accumulate(self._counts)
        family.add_metric(self._label_values, list(zip(bounds, counts, strict=True)), self._sum)
        return [family]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A metric and its samples: (name, labels, value)."""

    name: str
    help: str
    kind: str
    samples: tuple[tuple[str, dict[str, str], float], ...]


def render_sum(shares: Iterable[Iterable[Series]]) -> bytes:
    """The series of several processes, added up, in Prometheus' text format."""
    metrics: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for series in (series for share in shares for series in share):
        if series.name not in metrics:
            metrics[series.name] = Metric(series.name, series.help, series.kind)
        of_metric = sums.setdefault(series.name, {})
        for name, labels, value in series.samples:
            key = name, tuple(labels.items())
            of_metric[key] = of_metric.get(key, 0.0) + value
    for name, metric in metrics.items():
        for (sample, labels_of), value in sums[name].items():
            metric.add_sample(sample, dict(labels_of), value)
    data: bytes = prometheus_client.generate_latest(_Collected(list(metrics.values())))
    return data


class _Collected(CollectorRegistry):
    """A registry of metrics that have been collected."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def series_of(registry: CollectorRegistry) -> list[Series]:
    """Every series of a registry."""
    return [
        Series(
            name=metric.name,
            help=metric.documentation,
            kind=metric.type,
            samples=tuple((s.name, s.labels, s.value) for s in metric.samples),
        )
        for metric in registry.collect()
    ]
