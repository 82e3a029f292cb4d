"""One /metrics page, fetched and laid out for reading; no HTTP library is needed for that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from slipstream.errors import UnavailableError
from slipstream.security.http_ends import client_context, name_demanded
from slipstream.security.names import ComponentRole

MAX_BYTES = 32 << 20

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Page:
    """The samples of a page, by name."""

    samples: Mapping[str, list[tuple[Labels, float]]] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples that have these labels; 0 without any."""
        return sum(value for own, value in self._of(name) if _has(own, labels))

    def buckets(self, name: str) -> dict[float, float]:
        """Of a histogram, over all its labels: how many values were at most each bound."""
        found: dict[float, float] = {}
        for labels, value in self._of(f"{name}_bucket"):
            bound = float(labels["le"])
            found[bound] = found.get(bound, 0.0) + value
        return found

    def _of(self, name: str) -> Iterator[tuple[Labels, float]]:
        yield from self.samples.get(name, ())


def parse(text: str) -> Page:
    """A page in Prometheus' text format."""
    samples: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return Page(samples)


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """The value below which `share` of a histogram's values are, as Prometheus' `histogram_quantile` estimates it.

    Args:
        buckets: cumulative counts by upper bound; the last bound is infinite.
    """
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    rank = share * buckets[bounds[-1]]
    if rank <= buckets[bounds[0]]:
        return bounds[0] * rank / buckets[bounds[0]] if buckets[bounds[0]] else bounds[0]
    for low, high in pairwise(bounds):
        if buckets[high] >= rank:
            if high == float("inf"):
                return low
            return low + (high - low) * (rank - buckets[low]) / (buckets[high] - buckets[low])
    return bounds[-1]


async def fetch(url: str, timeout_s: float, component: ComponentRole | None = None, key: str | None = None) -> Page:
    """The page at an http or https URL.

    Args:
        key: an API key, where one is wanted.
        component: what has to answer there over TLS; None: a public face, with the host's name in its certificate.

    Raises:
        UnavailableError: nobody answers there, or not with a page, within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            head, body = await _get(url, component, key)
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
        reason = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
        raise UnavailableError(f"{url}: {reason}") from None
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise UnavailableError(f"{url}: answered {head.splitlines()[0].decode('latin-1', 'replace')!r}")
    return parse(body.decode())


async def _get(url: str, component: ComponentRole | None, key: str | None) -> tuple[bytes, bytes]:
    parts = urlsplit(url)
    tls, name, port = None, None, 80
    if parts.scheme == "https":
        tls, port = client_context(), 443
        name = name_demanded(component) if component is not None else None
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or port, limit=MAX_BYTES, ssl=tls, server_hostname=name
    )
    try:
        # 1.0: the answer ends with the connection, and comes in one piece.
        headers = f"Host: {parts.netloc}\r\nAccept: text/plain\r\n"
        headers += f"Authorization: Bearer {key}\r\n" if key is not None else ""
        writer.write(f"GET {parts.path or '/'} HTTP/1.0\r\n{headers}\r\n".encode())
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.read(-1)
    finally:
        writer.close()
    return head, body


def _has(labels: Labels, wanted: Labels) -> bool:
    return all(labels.get(name) == value for name, value in wanted.items())
