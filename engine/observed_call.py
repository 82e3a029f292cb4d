"""A request on a worker, as it is observed: its stages measured, its spans, its id on every log line.

The engine says when a request was queued, first scheduled and so on (`EngineTimes`); here that becomes the metric
`slipstream_worker_stage_seconds` and, when the request is traced, a span for each stage below the one of the call:

    queue     until the engine computed anything of it
    transfer  until the blocks were there (decode), from the computed prompt until they were taken over (prefill)
    prefill   until the prompt was computed
    decode    from the first token to the last
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import structlog
from prometheus_client import Histogram

from engine.protocol import PromptComputed, TokensGenerated
from slipstream import tracing
from slipstream.tracing import OFF, Span, Value
from slipstream.v1.sampling_pb2 import RequestAccount

STAGE_S = Histogram(
    "slipstream_worker_stage_seconds",
    "What requests spent on this worker: queue (until the engine computed anything of it), transfer (until the blocks "
    "of its prompt were there; on a prefill worker until they were taken over), prefill (until its prompt was "
    "computed), decode (from its first token to its last).",
    ("stage",),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
    registry=None,  # `engine.worker_metrics` serves it, with the worker's labels
)


class ObservedCall:
    """One call to a worker's service. Make it in the call's own task, and `end` it in every case.

    Args:
        name: of the call's span, as `PrefillWorker/Prefill`.
        trace: what the caller sent of its own (`Span.metadata`).
    """

    __slots__ = ("_computed_s", "_span")

    def __init__(self, name: str, request_id: str, trace: Mapping[str, str]) -> None:
        self._span: Span = OFF
        self._computed_s = 0.0
        bound = {"request_id": request_id}
        if tracing.enabled():
            self._span = tracing.start(f"slipstream.v1.{name}", trace)
            self._span.set("slipstream.request_id", request_id)
            bound["trace_id"] = self._span.trace_id
        # Never unbound: the task of a call has a context of its own, and ends with it.
        structlog.contextvars.bind_contextvars(**bound)

    def computed(self, computed: PromptComputed) -> None:
        """The prompt is in the KV cache of this prefill worker, which has yet to hand it over."""
        self._computed_s = time.monotonic()
        times = computed.times
        if times is not None:
            self._stage("queue", times.queued_s, times.scheduled_s)
            self._stage("prefill", times.scheduled_s, times.first_token_s, _tokens_of(computed))

    def handed_over(self, outcome: str) -> None:
        """The lease on the prompt's blocks ended in this way. Of a prompt that was not computed nothing is told."""
        if not self._computed_s:
            return
        computed_s, self._computed_s = self._computed_s, 0.0
        self._stage("transfer", computed_s, time.monotonic(), {"slipstream.outcome": outcome})

    def generated(self, tokens: TokensGenerated) -> None:
        """The last tokens of this decode worker, which come with the times and the account."""
        times, account = tokens.times, tokens.account
        if times is None or account is None:
            return
        if account.kv_blocks_moved or account.fallback:
            # It is scheduled once the blocks are there, or will not come.
            self._stage("transfer", times.queued_s, times.scheduled_s, _transfer_of(account), account.fallback)
        else:
            self._stage("queue", times.queued_s, times.scheduled_s)
        self._stage("prefill", times.scheduled_s, times.first_token_s)
        self._stage("decode", times.first_token_s, times.last_token_s)

    def fail(self, reason: str) -> None:
        """It ended in an error."""
        self._span.fail(reason)

    def end(self) -> None:
        """The call is over. A caller that has what it wants ends a Prefill before it says how it was handed over."""
        self.handed_over("ended_by_caller")
        self._span.end()

    def _stage(
        self, name: str, start_s: float, end_s: float, facts: Mapping[str, Value] | None = None, failed: str = ""
    ) -> None:
        lasted_s = max(0.0, end_s - start_s)
        STAGE_S.labels(name).observe(lasted_s)
        if not self._span.recording:
            return
        start_ns = tracing.unix_ns(start_s)
        span = self._span.child(name, start_ns=start_ns)
        for fact, value in (facts or {}).items():
            span.set(fact, value)
        if failed:
            span.fail(failed)
        span.end(start_ns + int(lasted_s * 1e9))


def _tokens_of(computed: PromptComputed) -> dict[str, Value]:
    return {
        "slipstream.tokens.computed": computed.computed_tokens,
        "slipstream.tokens.cached": computed.cached_tokens,
        "slipstream.tokens.received": computed.received_tokens,
    }


def _transfer_of(account: RequestAccount) -> dict[str, Value]:
    return {
        "slipstream.kv.bytes": account.kv_bytes_moved,
        "slipstream.kv.blocks": account.kv_blocks_moved,
        "slipstream.kv.transport": account.transport,
        "slipstream.kv.busy_s": account.transfer_s,
        "slipstream.kv.exposed_s": account.transfer_exposed_s,
    }
