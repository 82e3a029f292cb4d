"""One HTTP request's way through a global frontend: to a cluster, to another one if that fails, and the answer back.

Until the first byte of an answer has come nothing was sent to the client, so that a failure is made good by trying
another cluster: a frontend sends no head before its first token. What the client is to blame for (4xx) is passed on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from starlette.types import Send

from frontend.admission.claim import Priority
from frontend.admission.tenants import CLASS_HEADER, PREFIX_HEADER, TIMEOUT_HEADER
from frontend.clusters import metrics
from frontend.clusters.asked import Asked
from frontend.clusters.fleet import ClusterFleet, Visit
from frontend.clusters.upstream import Headers, UpstreamAnswer, UpstreamError
from frontend.http_exchange import body_message, send_last, sse_event
from frontend.keys.guard import KEY_HEADERS, PEER_KEY_HEADER, Caller
from frontend.keys.vouching import CALLER_HEADER, vouched
from frontend.openai_responses import error_body
from slipstream import telemetry
from slipstream.errors import ClusterLostError, DeadlineError, NoClusterError

log = telemetry.get_logger(__name__)

CLUSTER_HEADER = "x-slipstream-cluster"
"""Which cluster answered, and why it was chosen: `eu; prefix_hit`."""

MAX_WHOLE_BYTES = 64 << 20
"""Of an answer that is not streamed."""

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
     b"transfer-encoding", b"upgrade")
)  # fmt: skip
_NOT_PASSED_ON = _HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"accept-encoding",  # events are passed on as they come, not unpacked
    b"x-request-id",
    PEER_KEY_HEADER.encode(),
    PREFIX_HEADER.encode(),
    CALLER_HEADER.encode(),
    TIMEOUT_HEADER.encode(),
}
_KEYS = frozenset(name.encode() for name in KEY_HEADERS)
_NOT_PASSED_BACK = _HOP_BY_HOP | {b"date", b"server", b"x-request-id", CLUSTER_HEADER.encode()}
_UNAVAILABLE = frozenset((500, 502, 503))
_CLASS_NAME = CLASS_HEADER.encode()
_CLASSES = {one.label: one for one in Priority}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as it came.

    Attributes:
        request_id: as the client knows it; clusters make it unique.
        timeout_s: longest it may take in all.
        caller: whose key it came with; the key itself then goes no further.
    """

    path: str
    headers: Headers
    body: bytes
    asked: Asked
    request_id: str
    timeout_s: float
    service_class: str = "realtime"
    caller: Caller | None = None


@dataclass(slots=True)
class _Refusal:
    """What a cluster said instead of an answer; kept in case no other one does better."""

    status: int
    headers: list[tuple[bytes, bytes]]
    content: bytes
    cluster: str

    @property
    def retry_after_s(self) -> float:
        value = next((value for name, value in self.headers if name == b"retry-after"), b"")
        return float(value) if value.isdigit() else math.inf


@dataclass(slots=True)
class Forwarding:
    """One request's; `run` it once."""

    fleet: ClusterFleet
    exchange: Exchange
    _excluded: set[str] = field(default_factory=set)
    _avoided: set[str] = field(default_factory=set)
    _refusals: list[_Refusal] = field(default_factory=list)
    _attempts: int = 0

    async def run(self, send: Send) -> None:
        """Answer it.

        Raises:
            NoClusterError, ModelNotFoundError, DeadlineError: before anything was sent.
        """
        deadline = asyncio.timeout(self.exchange.timeout_s)
        try:
            async with deadline:
                ends_s = self.fleet.clock() + self.exchange.timeout_s
                while not await self._attempt(send, ends_s):
                    pass
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise DeadlineError(
                f"The request took longer than the {self.exchange.timeout_s:g} s allowed "
                f"({TIMEOUT_HEADER}, frontend.request_timeout_s)."
            ) from error

    async def _attempt(self, send: Send, ends_s: float) -> bool:
        """Whether the client has its answer."""
        try:
            visit = self._choose()
        except NoClusterError:
            if not self._refusals:
                raise
            await self._pass_refusal(send)
            return True
        outcome = "cancelled"
        try:
            answer = await self._ask(visit, ends_s)
            if answer is None:
                outcome = "failed"
                return False
            try:
                outcome = await self._take(visit, answer, send)
            finally:
                answer.close()
            return outcome in ("answered", "refused", "lost")
        finally:
            self.fleet.end(visit, outcome)

    def _choose(self) -> Visit:
        if self._attempts >= self.fleet.settings.max_attempts:
            raise self.fleet.none_left(self.fleet.members)
        visit = self.fleet.choose(
            self.exchange.asked,
            "http",
            self.exchange.service_class,
            frozenset(self._excluded),
            frozenset(self._avoided),
        )
        self._attempts += 1
        return visit

    async def _ask(self, visit: Visit, ends_s: float) -> UpstreamAnswer | None:
        headers = self._headers(visit, ends_s - self.fleet.clock())
        try:
            return await visit.member.upstream.send("POST", self.exchange.path, headers, self.exchange.body)
        except UpstreamError as error:
            self._failed(visit, "unreachable" if error.unreachable else "lost", str(error), error.unreachable)
            return None

    async def _take(self, visit: Visit, answer: UpstreamAnswer, send: Send) -> str:
        """What became of the request at this cluster; `failed` and `overloaded` ones go to another."""
        if answer.status == 200 and answer.header(b"content-type").startswith(b"text/event-stream"):
            self.fleet.answered(visit, self.exchange.asked, measured=True)
            await send(self._start(visit, answer.status, answer.headers))
            return await self._stream(visit, answer, send)
        try:
            content = await answer.read_all(MAX_WHOLE_BYTES)
        except UpstreamError as error:
            self._failed(visit, "lost", str(error), unreachable=False)
            return "failed"
        refusal = _Refusal(answer.status, answer.headers, content, visit.member.known.cluster)
        if answer.status == 401 and b'"invalid_peer_key"' in content:
            visit.member.known.silent("the cluster refuses this global frontend's key", refused=True)
            self._failed(visit, "refused_key", "401", unreachable=False)
            return "failed"
        if answer.status in _UNAVAILABLE:
            self._refusals.append(refusal)
            self._failed(visit, "error", f"status {answer.status}: {content[:200]!r}", unreachable=False)
            return "failed"
        if answer.status == 429 and b'"rate_limit_exceeded"' not in content:  # a key's rate is not another's to give
            self._overloaded(visit, refusal)
            return "overloaded"
        if answer.status < 400:
            self.fleet.answered(visit, self.exchange.asked, measured=False)
        await self._pass_whole(visit, refusal, send)
        return "answered" if answer.status < 400 else "refused"

    async def _stream(self, visit: Visit, answer: UpstreamAnswer, send: Send) -> str:
        silence_s = self.fleet.settings.silence_timeout_s
        try:
            while True:
                async with asyncio.timeout(silence_s):
                    part = await answer.read()
                if not part:
                    break
                await send(body_message(part, more=True))
        except (UpstreamError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            lost = self._lost(visit, str(error) or f"silent for {silence_s:g} s")
            await send_last(send, body_message(sse_event(error_body(lost)), more=False))
            return "lost"
        await send_last(send, body_message(b"", more=False))
        return "answered"

    def _lost(self, visit: Visit, reason: str) -> ClusterLostError:
        visit.member.breaker("http").failed(self.fleet.clock(), unreachable=False)
        log.warning("cluster_lost", request_id=self.exchange.request_id, endpoint=visit.member.known.endpoint,
                    reason=reason)  # fmt: skip
        return ClusterLostError(f"The cluster was lost in the middle of the answer ({reason}); ask again.")

    def _failed(self, visit: Visit, why: str, reason: str, unreachable: bool) -> None:
        known = visit.member.known
        self._excluded.add(known.endpoint)
        self._avoided.add(known.cluster)
        self.fleet.failed(visit, self.exchange.request_id, why, reason, unreachable=unreachable)

    def _overloaded(self, visit: Visit, refusal: _Refusal) -> None:
        known = visit.member.known
        self._refusals.append(refusal)
        self._excluded.add(known.endpoint)
        self._avoided.add(known.cluster)
        metrics.FAILOVERS.labels(known.cluster, "overloaded").inc()

    async def _pass_refusal(self, send: Send) -> None:
        """The best of what clusters said: overloaded with the shortest wait, else the last error."""
        overloaded = [one for one in self._refusals if one.status == 429]
        best = min(overloaded, key=lambda one: one.retry_after_s) if overloaded else self._refusals[-1]
        await self._send_whole(best, best.cluster, send)

    async def _pass_whole(self, visit: Visit, answer: _Refusal, send: Send) -> None:
        await self._send_whole(answer, f"{answer.cluster}; {visit.choice.reason.value}", send)

    async def _send_whole(self, answer: _Refusal, cluster: str, send: Send) -> None:
        headers = _passed_back(answer.headers, cluster, without_length=True)
        headers.append((b"content-length", b"%d" % len(answer.content)))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send_last(send, body_message(answer.content, more=False))

    def _start(self, visit: Visit, status: int, headers: Headers) -> dict[str, object]:
        cluster = f"{visit.member.known.cluster}; {visit.choice.reason.value}"
        passed = _passed_back(headers, cluster, without_length=False)
        return {"type": "http.response.start", "status": status, "headers": passed}

    def _headers(self, visit: Visit, left_s: float) -> list[tuple[bytes, bytes]]:
        caller = self.exchange.caller
        left_out = _NOT_PASSED_ON if caller is None else _NOT_PASSED_ON | _KEYS
        passed = [pair for pair in self.exchange.headers if pair[0] not in left_out]
        if caller is not None:
            passed.append((CALLER_HEADER.encode(), vouched(caller.key, self.exchange.asked.model).encode()))
        names = self.exchange.asked.names
        passed += [
            (b"x-request-id", self.exchange.request_id.encode()),
            (TIMEOUT_HEADER.encode(), b"%.3f" % max(left_s, 0.001)),
            (PEER_KEY_HEADER.encode(), visit.member.key.encode()),
        ]
        if names.prompt_bytes:
            passed.append((PREFIX_HEADER.encode(), names.to_header().encode()))
        return passed


def service_class_of(headers: Iterable[tuple[bytes, bytes]], caller: Caller | None) -> str:
    """The class that a request names; what is no class its cluster will refuse.

    Raises:
        NotAllowedError: the caller's key is not for it.
    """
    said = next((value.decode("latin-1") for name, value in headers if name == _CLASS_NAME), "")
    return class_of(said, caller)


def class_of(said: str, caller: Caller | None) -> str:
    """The same of what a header says."""
    wanted = _CLASSES.get(said.strip().lower())
    if caller is not None:
        wanted = caller.allowed_class(wanted, Priority.REALTIME)
    return (wanted or Priority.REALTIME).label


def _passed_back(
    headers: Sequence[tuple[bytes, bytes]], cluster: str, *, without_length: bool
) -> list[tuple[bytes, bytes]]:
    left_out = _NOT_PASSED_BACK | {b"content-length"} if without_length else _NOT_PASSED_BACK
    passed = [pair for pair in headers if pair[0] not in left_out]
    passed.append((CLUSTER_HEADER.encode(), cluster.encode("latin-1")))
    return passed
