"""What a global frontend counts. Labels are clusters' names, as configured, and words of fixed lists."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 10)

REQUESTS = Counter(
    "slipstream_global_requests",
    "Requests sent to a cluster, by what became of them there: answered, refused (its client's fault), overloaded, "
    "failed, lost (in the middle of the answer), cancelled. Failed or lost ones: see the log's cluster_failed.",
    ("cluster", "face", "outcome"),
)
CHOICES = Counter(
    "slipstream_global_choices",
    "Choices of a cluster, by why. Many of spill_over: the homes of sessions are full; any of last_resort: no cluster "
    "is healthy.",
    ("cluster", "reason"),
)
FAILOVERS = Counter(
    "slipstream_global_failovers",
    "Requests that went on at another cluster, by the one that they left and why: refused_key, unreachable, lost, "
    "error, overloaded, resumed (in the middle of the answer).",
    ("cluster", "why"),
)
IN_FLIGHT = Gauge("slipstream_global_requests_in_flight", "Requests at each cluster now.", ("cluster",))
HEALTH = Gauge(
    "slipstream_global_cluster_up", "1 when the cluster takes requests, by this frontend's word.", ("cluster",)
)
STATE_AGE_S = Gauge(
    "slipstream_global_state_age_seconds",
    "Since each cluster last said how it is; beyond global_frontend.stale_after_s it gets nothing.",
    ("cluster",),
)
ROUND_TRIP_S = Gauge("slipstream_global_round_trip_seconds", "The way to each cluster and back.", ("cluster",))
FIRST_BYTE_S = Histogram(
    "slipstream_global_first_byte_seconds",
    "From sending a request to a cluster to the first byte of its answer, of streamed ones.",
    ("cluster",),
    buckets=_LATENCY_S,
)
PREDICTION_RATIO = Histogram(
    "slipstream_global_prediction_ratio",
    "Time to the first byte of a streamed answer over what was predicted. Far from 1: look at the cluster's own "
    "slipstream_frontend_prediction_ratio, then at the round trip.",
    ("cluster",),
    buckets=_RATIOS,
)
