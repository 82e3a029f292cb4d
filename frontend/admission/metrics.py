"""What admission counts. A tenant has a label of its own while there are few; all others share one."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram

from frontend.admission.claim import Claim, Priority

MAX_TENANT_LABELS = 32
OTHER_TENANTS = "other"

QUEUED = Gauge(
    "slipstream_frontend_queue_requests",
    "Requests that wait in this frontend for room at the workers, by class. Above zero for long: add workers.",
    ["class"],
    multiprocess_mode="livesum",
)
WAIT_SECONDS = Histogram(
    "slipstream_frontend_queue_seconds",
    "Wait of requests in the frontend's queue before they went to the workers, by class. Those that did not wait are "
    "in the first bucket.",
    ["class"],
    buckets=(0.001, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
ADMITTED = Counter(
    "slipstream_frontend_admitted",
    "Requests that went to the workers, by class and tenant.",
    ["class", "tenant"],
)
REFUSED = Counter(
    "slipstream_frontend_refused",
    "Requests turned away with 429, by class, tenant and reason: queue_overflow, long_wait, shed (gave way in a full "
    "queue) or deadline_unreachable. Batch alone: as it should be under load. Realtime: the cluster is too small.",
    ["class", "tenant", "reason"],
)
PREEMPTED = Counter(
    "slipstream_frontend_preempted",
    "Times a batch request in flight was sent back into the queue because the SLO of a realtime one was at risk.",
    ["tenant"],
)

# Series that are there from the start have a value, and a rate, before and at their first event.
for _priority in Priority:
    QUEUED.labels(_priority.label)
    WAIT_SECONDS.labels(_priority.label)


class TenantLabels:
    """A bounded set of labels: configured names, then the first others that come."""

    def __init__(self, names: Iterable[str]) -> None:
        self._labels = set(names)
        self._limit = len(self._labels) + MAX_TENANT_LABELS

    def of(self, claim: Claim) -> str:
        """The label of a request's tenant."""
        if claim.tenant in self._labels:
            return claim.tenant
        if len(self._labels) >= self._limit:
            return OTHER_TENANTS
        self._labels.add(claim.tenant)
        return claim.tenant


class AdmissionMetrics:
    """The metrics with their labels' children at hand: nothing is looked up twice for a class and tenant."""

    def __init__(self, names: Iterable[str]) -> None:
        self.labels = TenantLabels(names)
        self._admitted: dict[tuple[int, str], tuple[Counter, Histogram]] = {}

    def admitted(self, claim: Claim, waited_s: float) -> None:
        tenant = self.labels.of(claim)
        children = self._admitted.get((claim.priority, tenant))
        if children is None:
            label = claim.priority.label
            children = ADMITTED.labels(label, tenant), WAIT_SECONDS.labels(label)
            self._admitted[claim.priority, tenant] = children
        children[0].inc()
        children[1].observe(waited_s)

    def refused(self, claim: Claim, reason: str) -> None:
        REFUSED.labels(claim.priority.label, self.labels.of(claim), reason).inc()

    def preempted(self, claim: Claim) -> None:
        PREEMPTED.labels(self.labels.of(claim)).inc()
