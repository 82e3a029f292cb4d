"""How long this process' certificates are good for, on every /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slipstream.errors import ConfigError
from slipstream.security import identity as identities


class CertificateCollector(Collector):
    """Of the process' identity at the time of asking; nothing without certificates."""

    def __init__(self, unix_clock: Callable[[], float] = time.time) -> None:
        self._unix_clock = unix_clock

    def describe(self) -> Iterable[Metric]:
        """Nothing is read when it is registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "slipstream_certificate_seconds_to_expiry",
            "Until a certificate that this process uses ends; below 0 it has. `slipstream ca renew` makes new ones, "
            "which are taken without a restart.",
            labels=("certificate",),
        )
        now_unix_s = self._unix_clock()
        for name, ends_unix_s in _ends().items():
            family.add_metric((name,), ends_unix_s - now_unix_s)
        if family.samples:
            yield family


def _ends() -> dict[str, float]:
    identity, ends = identities.current(), dict[str, float]()
    try:
        if identity.tls is not None:
            material = identity.tls.current()[1]
            ends["component"] = material.not_after_unix_s
            if material.ca_not_after_unix_s is not None:
                ends["authority"] = material.ca_not_after_unix_s
        if identity.face is not None:
            ends["face"] = identity.face.current()[1].not_after_unix_s
    except ConfigError:  # never read: whoever listens with it says so
        pass
    return ends
