"""What `slipstream top` shows, computed from two looks at the cluster: rates, percentiles, one row a worker. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from slipstream.cli.scrape import Page, quantile
from slipstream.v1.registry_pb2 import HealthState, Role, WorkerRecord, WorkerState

_FAILED = frozenset({"UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED", "UNKNOWN"})


@dataclass(frozen=True, slots=True)
class Look:
    """The cluster at one moment.

    Attributes:
        at_s: monotonic seconds.
        frontends: pages by URL, of those that answered.
        workers: as the registry knows them.
        pages: workers' own pages by id, of those that answered.
        problems: what did not answer, in words.
    """

    at_s: float
    frontends: Mapping[str, Page]
    workers: Sequence[WorkerRecord]
    pages: Mapping[str, Page]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClusterFigures:
    """All frontends together. Rates and latencies are of the time between the looks; None: there were none.

    Attributes:
        awaiting: requests of which no token has come yet; of them `queued` wait in engines.
        hit_rate: the part of prompt tokens that no worker computed.
    """

    seconds: float
    requests_per_s: float
    errors_per_s: float
    prompt_tokens_per_s: float
    tokens_per_s: float
    in_flight: int
    awaiting: int
    queued: int
    hit_rate: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One worker. `tokens_per_s`: prompt tokens computed (prefill), tokens generated (decode)."""

    worker_id: str
    role: str
    state: str
    model: str
    running: int
    waiting: int
    kv_use: float | None
    hit_rate: float | None
    tokens_per_s: float
    handoffs_held: int
    fallbacks_total: int
    health: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """One screen."""

    cluster: ClusterFigures
    workers: tuple[WorkerFigures, ...]
    problems: tuple[str, ...] = field(default=())


def figures(before: Look, now: Look) -> Figures:
    """What happened between two looks, and how things stand at the second."""
    rows = [_worker(record, before, now) for record in now.workers]
    workers = sorted(rows, key=lambda row: (row.role != "prefill", row.worker_id))
    return Figures(_cluster(before, now), tuple(workers), now.problems)


def _cluster(before: Look, now: Look) -> ClusterFigures:
    seconds = max(now.at_s - before.at_s, 1e-9)

    def grown(name: str) -> float:
        return _growth(before, now, lambda page: page.total(name))

    def latency(name: str, share: float) -> float | None:
        return quantile(share, _bucket_growth(name, before, now))

    def standing(name: str) -> int:
        return int(sum(page.total(name) for page in now.frontends.values()))

    requests = grown("slipstream_frontend_input_sequence_tokens_count")
    prompts = grown("slipstream_frontend_input_sequence_tokens_sum")
    ttft, itl = "slipstream_frontend_time_to_first_token_seconds", "slipstream_frontend_inter_token_latency_seconds"
    return ClusterFigures(
        seconds=seconds,
        requests_per_s=requests / seconds,
        errors_per_s=_growth(before, now, _failures) / seconds,
        prompt_tokens_per_s=prompts / seconds,
        tokens_per_s=grown("slipstream_frontend_completion_tokens_total") / seconds,
        in_flight=standing("slipstream_frontend_requests_in_flight"),
        awaiting=standing("slipstream_frontend_requests_awaiting_first_token"),
        queued=sum(record.load.waiting for record in now.workers),
        hit_rate=_share(grown("slipstream_frontend_cached_prompt_tokens_total"), prompts),
        ttft_p50_s=latency(ttft, 0.5),
        ttft_p99_s=latency(ttft, 0.99),
        itl_p50_s=latency(itl, 0.5),
        itl_p99_s=latency(itl, 0.99),
    )


def _failures(page: Page) -> float:
    """Requests that failed through no fault of their client."""
    answered = page.samples.get("slipstream_frontend_requests_total", ())
    failed = sum(value for labels, value in answered if labels["code"].startswith("5") or labels["code"] in _FAILED)
    return failed + page.total("slipstream_frontend_broken_streams_total")


def _worker(record: WorkerRecord, before: Look, now: Look) -> WorkerFigures:
    load, capacity = record.load, record.capacity
    earlier = next((one for one in before.workers if one.worker_id == record.worker_id), None)
    same = earlier is not None and earlier.epoch == record.epoch
    tokens = load.tokens_total - earlier.load.tokens_total if earlier is not None and same else load.tokens_total
    page = now.pages.get(record.worker_id, Page())
    cached = page.total("slipstream_worker_prompt_tokens_cached_total")
    return WorkerFigures(
        worker_id=record.worker_id,
        role=Role.Name(record.role).removeprefix("ROLE_").lower(),
        state=WorkerState.Name(record.state).removeprefix("WORKER_STATE_").lower(),
        model=record.model,
        running=load.running,
        waiting=load.waiting,
        kv_use=_share(load.blocks_used, capacity.blocks),
        hit_rate=_share(cached, page.total("slipstream_worker_prompt_tokens_total")),
        tokens_per_s=max(0.0, tokens / max(now.at_s - before.at_s, 1e-9)) if same else 0.0,
        handoffs_held=load.handoffs_held,
        fallbacks_total=load.fallbacks_total,
        health=HealthState.Name(record.health.state).lower() if record.health.state else "",
        why=record.health.reasons[0].text if record.health.reasons else record.health.fenced_because,
    )


def _growth(before: Look, now: Look, reading: Callable[[Page], float]) -> float:
    """Of a counter, over all frontends. One that was restarted, or is new, has grown from nothing."""
    total = 0.0
    for url, page in now.frontends.items():
        value = reading(page)
        earlier = reading(before.frontends[url]) if url in before.frontends else 0.0
        total += value - earlier if value >= earlier else value
    return total


def _bucket_growth(name: str, before: Look, now: Look) -> dict[float, float]:
    grown: dict[float, float] = {}
    for url, page in now.frontends.items():
        earlier = before.frontends[url].buckets(name) if url in before.frontends else {}
        buckets = page.buckets(name)
        if any(count < earlier.get(bound, 0.0) for bound, count in buckets.items()):
            earlier = {}
        for bound, count in buckets.items():
            grown[bound] = grown.get(bound, 0.0) + count - earlier.get(bound, 0.0)
    return grown


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
