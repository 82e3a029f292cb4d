"""All clusters as a global frontend sees them, and its way to each: chooses, and takes note of what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from frontend.clusters import metrics
from frontend.clusters.asked import Asked
from frontend.clusters.breaker import Breaker, Health
from frontend.clusters.choice import Ask, Choice, choose
from frontend.clusters.known import KnownFrontend, candidate, prefill_s
from frontend.clusters.upstream import Upstream, target_of
from slipstream import telemetry
from slipstream.errors import ConfigError, ModelNotFoundError, NoClusterError
from slipstream.settings import GlobalFrontendSettings, PeerClusterSettings

log = telemetry.get_logger(__name__)

Face = Literal["http", "grpc"]
RETRY_AFTER_S = 2.0


@dataclass(slots=True)
class Member:
    """One frontend of a cluster.

    Attributes:
        grpc_address: host:port of its gRPC face; empty without.
    """

    known: KnownFrontend
    upstream: Upstream
    key: str
    grpc_address: str = ""
    tls: bool = False
    ca_file: str | None = None

    def breaker(self, face: Face) -> Breaker:
        return self.known.http if face == "http" else self.known.grpc


@dataclass(slots=True)
class Visit:
    """One request at one frontend; `end` it once."""

    member: Member
    choice: Choice
    face: Face
    began_s: float
    probing: bool
    ended: bool = field(default=False)


class ClusterFleet:
    """Close it when done.

    Args:
        name: this global frontend's own; makes several take equals in another order.
    """

    def __init__(
        self, settings: GlobalFrontendSettings, name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings, self.name, self.clock = settings, name, clock
        self.members = [member for one in settings.clusters for member in _members(one, settings)]
        self._by_endpoint = {one.known.endpoint: one for one in self.members}

    @property
    def ready(self) -> bool:
        """Whether any cluster takes requests."""
        now_s = self.clock()
        return any(self.health(one, "http", now_s) is not Health.DOWN for one in self.members)

    def health(self, member: Member, face: Face, now_s: float) -> Health:
        return member.known.usable(member.breaker(face), now_s, self.settings.stale_after_s)

    def choose(
        self, asked: Asked, face: Face, service_class: str, excluded: frozenset[str], avoided: frozenset[str]
    ) -> Visit:
        """Where a request goes; it has begun there.

        Raises:
            NoClusterError: none is left that could take it.
            ModelNotFoundError: no cluster serves the model.
        """
        now_s = self.clock()
        members = [one for one in self.members if face == "http" or one.grpc_address]
        self._check_model(asked.model, members, now_s)
        cached: dict[str, int] = {}
        in_flight: dict[str, int] = {}
        for one in members:
            known = one.known
            cached[known.cluster] = max(cached.get(known.cluster, 0), known.cached_bytes(asked.names, now_s))
            in_flight[known.cluster] = in_flight.get(known.cluster, 0) + known.in_flight
        candidates = [
            candidate(
                one.known,
                one.breaker(face),
                asked.model,
                service_class,
                now_s,
                stale_after_s=self.settings.stale_after_s,
                in_flight=in_flight[one.known.cluster],
                cached_bytes=cached[one.known.cluster],
            )
            for one in members
        ]
        choice = choose(Ask(asked.names.prompt_bytes, asked.session, excluded, avoided), candidates, self.name)
        if choice is None:
            raise self.none_left(members)
        return self._begin(choice, asked, face, now_s)

    def end(self, visit: Visit, outcome: str) -> None:
        """A request is over there; again is fine."""
        if visit.ended:
            return
        visit.ended = True
        known = visit.member.known
        known.end()
        visit.member.breaker(visit.face).probing -= visit.probing
        metrics.IN_FLIGHT.labels(known.cluster).dec()
        metrics.REQUESTS.labels(known.cluster, visit.face, outcome).inc()

    def answered(self, visit: Visit, asked: Asked, *, measured: bool) -> None:
        """The answer has begun.

        Args:
            measured: whether the time until now is the time to the first token.
        """
        now_s, known = self.clock(), visit.member.known
        visit.member.breaker(visit.face).succeeded()
        known.answered(asked.names, now_s)
        if measured:
            took_s, predicted_s = now_s - visit.began_s, visit.choice.predicted.ttft_s
            metrics.FIRST_BYTE_S.labels(known.cluster).observe(took_s)
            if predicted_s > 0:
                metrics.PREDICTION_RATIO.labels(known.cluster).observe(took_s / predicted_s)

    def failed(self, visit: Visit, request_id: str, why: str, reason: str, *, unreachable: bool = False) -> None:
        """The cluster is to blame for what became of a request there."""
        known = visit.member.known
        visit.member.breaker(visit.face).failed(self.clock(), unreachable=unreachable)
        metrics.FAILOVERS.labels(known.cluster, why).inc()
        log.warning("cluster_failed", request_id=request_id, endpoint=known.endpoint, why=why, reason=reason)

    def none_left(self, members: Sequence[Member]) -> NoClusterError:
        """What a client is told when all have failed its request."""
        states = [
            f"{one.known.endpoint}: {one.known.refusal or one.known.failure or 'failed this request'}"
            for one in members
        ]
        return NoClusterError(
            f"No cluster can take this request now ({'; '.join(states) or 'none has this face'}).",
            retry_after_s=RETRY_AFTER_S,
        )

    def close(self) -> None:
        for one in self.members:
            one.upstream.close()

    def _begin(self, choice: Choice, asked: Asked, face: Face, now_s: float) -> Visit:
        predicted = choice.predicted
        member = self._by_endpoint[predicted.endpoint]
        said = member.known.model(asked.model)
        member.known.begin(prefill_s(predicted.new_tokens, said.ready_s) if said is not None else 0.0, now_s)
        breaker = member.breaker(face)
        probing = breaker.health(now_s) is Health.PROBE
        breaker.probing += probing
        metrics.IN_FLIGHT.labels(predicted.cluster).inc()
        metrics.CHOICES.labels(predicted.cluster, choice.reason.value).inc()
        log.debug(
            "cluster_chosen",
            endpoint=predicted.endpoint,
            reason=choice.reason.value,
            predicted_ttft_s={one.endpoint: round(one.ttft_s, 4) for one in choice.considered},
            new_tokens=predicted.new_tokens,
            cached_bytes=predicted.cached_bytes,
        )
        return Visit(member, choice, face, now_s, probing)

    def _check_model(self, model: str, members: Sequence[Member], now_s: float) -> None:
        heard = [one for one in members if not one.known.stale(now_s, self.settings.stale_after_s)]
        if not model or not heard or any(one.known.model(model) for one in members):
            return
        served = sorted({each.name for one in heard if one.known.state for each in one.known.state.models})
        if not served:
            raise self.none_left(members)
        raise ModelNotFoundError(
            f"The model '{model}' does not exist; the clusters serve {', '.join(served)}.", param="model"
        )


def _members(settings: PeerClusterSettings, whole: GlobalFrontendSettings) -> list[Member]:
    key, ca_file = _key(settings), str(settings.ca_file) if settings.ca_file else None
    if len(settings.grpc) > len(settings.http):
        raise ConfigError(f"global_frontend.clusters: '{settings.name}' has more gRPC addresses than HTTP ones")
    members = []
    for place, url in enumerate(settings.http):
        target = target_of(url, ca_file)
        members.append(
            Member(
                KnownFrontend(f"{settings.name}/{place}", settings.name, settings.max_in_flight),
                Upstream(target, connect_timeout_s=whole.connect_timeout_s),
                key,
                settings.grpc[place] if place < len(settings.grpc) else "",
                target.tls is not None,
                ca_file,
            )
        )
    return members


def _key(settings: PeerClusterSettings) -> str:
    if (settings.key is None) == (settings.key_file is None):
        raise ConfigError(f"global_frontend.clusters: '{settings.name}' needs either key or key_file")
    key = settings.key or ""
    if settings.key_file is not None:
        try:
            key = settings.key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"global_frontend.clusters: '{settings.name}': {settings.key_file}: {error}") from None
    if not key.isascii() or not key.isprintable() or not key:
        raise ConfigError(f"global_frontend.clusters: the key of '{settings.name}' is not plain printable text")
    return key
