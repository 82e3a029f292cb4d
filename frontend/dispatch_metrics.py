"""What the dispatcher counts. All labels come from small fixed sets, so that every series is there from the start."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from frontend.router import Fallback
from frontend.worker_failure import FailureKind

DECODE_RECOMPUTED = "decode_recomputed"
"""Counted when the decode worker reports that the transfer failed and it computed the prompt itself."""

FALLBACKS = Counter(
    "slipstream_frontend_fallbacks",
    "Requests whose prompt the decode worker computed although a prefill worker should have, by reason. "
    "Alert on a rate above zero; no_prefill_worker means that the prefill pool is empty, no_path that KV blocks "
    "cannot travel from any prefill worker to any decode worker.",
    ["reason"],
)
WORKER_FAILURES = Counter(
    "slipstream_frontend_worker_failures",
    "Calls to workers that failed, by role and kind (lost, timeout, silent, refused, failed).",
    ["role", "kind"],
)
OPEN_REQUESTS = Gauge(
    "slipstream_frontend_dispatched_requests",
    "Requests that are with the workers now.",
    multiprocess_mode="livesum",
)
PREFILL_SECONDS = Histogram(
    "slipstream_frontend_prefill_seconds",
    "From dispatch to the computed prompt: the prefill worker's queue and its computation. Compare with the time "
    "to the first token to see what the transfer adds.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
ROUTES = Counter(
    "slipstream_frontend_routes",
    "Dispatches by policy and the reason for their workers; see docs/routing.md for the reasons.",
    ["policy", "reason"],
)
PREDICTION_RATIO = Histogram(
    "slipstream_frontend_prediction_ratio",
    "What was seen, over what the router predicted: of the prompt's computation with its queue (prefill), the time to "
    "the first token (ttft) and the time between tokens (itl). Near 1 is good; steadily far from it says that the "
    "workers' profiles are not theirs.",
    ["of"],
    buckets=(0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 2.0, 4.0, 10.0),
)
WRITE_BACKS = Counter(
    "slipstream_frontend_write_backs",
    "Times a decode worker was asked to hand over to a prefill worker what it has of a conversation.",
)
WRITE_BACK_TOKENS = Counter(
    "slipstream_frontend_write_back_tokens",
    "Prompt tokens that prefill workers received from decode workers and did not have to compute.",
)
WRITE_BACKS_REFUSED = Counter(
    "slipstream_frontend_write_backs_refused",
    "Write-backs of which nothing came: the decode worker had dropped the blocks, or could not send them. A large "
    "share of all write-backs says that the KV caches are too small for the conversations.",
)
REGISTRY_CONNECTED = Gauge(
    "slipstream_frontend_registry_connected",
    "1 while this frontend hears the control plane; at 0 it serves from its last view of the workers.",
    multiprocess_mode="livemin",
)
WORKERS = Gauge(
    "slipstream_frontend_workers",
    "Workers in this frontend's view, by role and state.",
    ["role", "state"],
    multiprocess_mode="livemax",
)
INDEX_BLOCKS = Gauge(
    "slipstream_frontend_index_blocks",
    "Different KV blocks that this frontend knows some worker to have. 0 under load: no worker tells what it caches "
    "(worker.cache_events).",
    multiprocess_mode="livemax",
)
CACHE_FEEDS_LOST = Counter(
    "slipstream_frontend_cache_feeds_lost",
    "Times a worker's cache feed broke and was asked for anew; a worker that leaves counts once. More than workers "
    "leave: connections break.",
)

# A series that begins with its first event has no rate at that event: all begin at 0.
for _reason in (*Fallback, DECODE_RECOMPUTED):
    FALLBACKS.labels(str(_reason))
for _role in ("prefill", "decode"):
    for _kind in FailureKind:
        WORKER_FAILURES.labels(_role, _kind.value)
