"""The part of a request's trace that one dispatch makes: a span for each call to a worker.

The workers' own spans become children of these, by the `traceparent` that the requests carry.
"""

from __future__ import annotations

from collections.abc import Mapping

from frontend.request_record import current_span
from frontend.worker_failure import WorkerFailure
from slipstream.tracing import OFF, Span
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.v1.worker_pb2 import DecodeEvent, PromptComputed


class AttemptTrace:
    """Spans `prefill` and `decode`; nothing at all when the request is not traced."""

    __slots__ = ("_decode", "_parent", "_prefill")

    def __init__(self) -> None:
        self._parent = current_span()
        self._prefill: Span = OFF
        self._decode: Span = OFF

    def prefill(self, worker: WorkerRecord) -> Mapping[str, str]:
        """The call to the prefill worker is about to be made; returns what it shall carry."""
        self._prefill = self._call("prefill", worker)
        return dict(self._prefill.metadata() or ())

    def decode(self, worker: WorkerRecord) -> Mapping[str, str]:
        """The call to the decode worker is about to be made; returns what it shall carry."""
        self._decode = self._call("decode", worker)
        return dict(self._decode.metadata() or ())

    def computed(self, computed: PromptComputed) -> None:
        """The prompt is computed, which is what the span `prefill` lasts until."""
        if self._prefill.recording:
            self._prefill.set("slipstream.tokens.computed", computed.computed_tokens)
            self._prefill.set("slipstream.tokens.cached", computed.cached_tokens)
            self._prefill.set("slipstream.tokens.received", computed.received_tokens)
        self._prefill.end()

    def finished(self, event: DecodeEvent) -> None:
        """The decode worker has sent its last tokens."""
        if self._decode.recording:
            self._decode.set("slipstream.kv.bytes", event.account.kv_bytes_moved)
            self._decode.set("slipstream.kv.transport", event.account.transport)
            if event.account.fallback:
                self._decode.set("slipstream.fallback", event.account.fallback)
        self._decode.end()

    def failed(self, failure: WorkerFailure) -> None:
        """One of the workers did not do its part."""
        span = self._prefill if failure.worker.role == Role.ROLE_PREFILL else self._decode
        span.fail(f"{failure.kind.value}: {failure.cause.message}")

    def close(self) -> None:
        """Whatever still runs was ended from here."""
        self._prefill.end()
        self._decode.end()

    def _call(self, name: str, worker: WorkerRecord) -> Span:
        if not self._parent.recording:
            return self._parent
        span = self._parent.child(name, calls=True)
        span.set("slipstream.worker", worker.worker_id)
        span.set("server.address", worker.address)
        return span
