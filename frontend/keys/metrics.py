"""What is counted of keys. Labels are bounded: reasons are a fixed list, and beyond a number tenants share one."""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import Counter, Gauge

MAX_TENANT_LABELS = 200
OTHER_TENANTS = "other"

REFUSALS = Counter(
    "slipstream_frontend_key_refusals_total",
    "Requests refused because of their API key, by reason: missing, malformed, unknown, wrong_secret, expired, "
    "revoked, not_yet_valid (401); scope, model, class (403); requests, input_tokens, output_tokens, streams, "
    "connections (429).",
    ["reason"],
)
TENANT_REQUESTS = Counter(
    "slipstream_frontend_tenant_requests_total",
    "Requests that came with a valid API key and were within its rates, by the key's tenant; the first 200 tenants "
    "have a label of their own.",
    ["tenant"],
)
TENANT_TOKENS = Counter(
    "slipstream_frontend_tenant_tokens_total",
    "Tokens of these requests, by tenant and kind: input or output.",
    ["tenant", "kind"],
)
FILE_GOOD = Gauge(
    "slipstream_frontend_keys_file_good",
    "1 while the key file is what the frontend goes by; 0 when its newest version is wrong, and an older one holds.",
    multiprocess_mode="livemin",
)
FILE_FAILURES = Counter(
    "slipstream_frontend_keys_file_failures_total", "Versions of the key file that could not be used."
)
KEYS = Gauge("slipstream_frontend_keys", "API keys known, valid or not.", multiprocess_mode="livemax")

_labels: set[str] = set()


class TenantSeries:
    """A tenant's series, looked up once."""

    __slots__ = ("input", "output", "requests")

    def __init__(self, label: str) -> None:
        self.requests = TENANT_REQUESTS.labels(label)
        self.input = TENANT_TOKENS.labels(label, "input")
        self.output = TENANT_TOKENS.labels(label, "output")


@lru_cache(maxsize=1024)
def series_of(tenant: str) -> TenantSeries:
    """The series that a tenant counts in."""
    if tenant not in _labels and len(_labels) >= MAX_TENANT_LABELS:
        return TenantSeries(OTHER_TENANTS)
    _labels.add(tenant)
    return TenantSeries(tenant)


def refused(reason: str) -> None:
    """A request was refused."""
    REFUSALS.labels(reason).inc()
