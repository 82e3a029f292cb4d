"""Sends requests to workers and streams their tokens back: the way of one request, and what happens when it breaks.

    route -> prefill worker computes the prompt, decode worker takes its blocks meanwhile and generates -> tokens

Both are called at once. A failed prefill worker is replaced by another or, in the end, by the decode worker
itself; a failed decode worker by another one, also in the middle of an answer where that leaves no trace. Every
wait has a limit, and leaving `generate` at any point ends all calls.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from frontend.attempt import Attempt, Surroundings
from frontend.cache_watch import CacheWatch
from frontend.cluster_view import ClusterView, ClusterWatch
from frontend.conversation_cache import PrefixChain
from frontend.conversations import Conversations
from frontend.dispatch_metrics import (
    DECODE_RECOMPUTED,
    FALLBACKS,
    OPEN_REQUESTS,
    PREFILL_SECONDS,
    WORKER_FAILURES,
)
from frontend.generation import ServedModel, TokenDelta, TokenRequest
from frontend.known_caches import KnownCaches
from frontend.migrations import Migrations
from frontend.prefix_names import from_header
from frontend.progress import Progress, ReplayDiverged
from frontend.request_life import note_route, stage
from frontend.request_record import current
from frontend.resident_prefixes import ResidentPrefixes
from frontend.router import RETRY_AFTER_S, Ask, Fleet, Route, Router
from frontend.routing import Routing
from frontend.worker_channels import Place, WorkerChannels
from frontend.worker_failure import FailureKind, WorkerFailure
from frontend.worker_stream import WorkerStreams
from slipstream import telemetry
from slipstream.background import background
from slipstream.errors import NoWorkerError
from slipstream.settings import FrontendSettings, Settings
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.v1.worker_pb2 import DecodeEvent

log = telemetry.get_logger(__name__)

LOOK_AGAIN_S = 0.1
"""How often an answer that waits for a worker looks for one; workers come seconds apart."""

FALLBACK_TOLD_EVERY_S = 10.0
"""Between two log lines of the same reason; the metric, the access log and `slipstream explain` have every one."""


@asynccontextmanager
async def open_dispatcher(settings: Settings) -> AsyncIterator[ClusterDispatcher]:
    """A dispatcher that follows the control plane while the body runs. Does not wait for workers: see `ready`."""
    async with AsyncExitStack() as stack:
        channels = await stack.enter_async_context(WorkerChannels())
        fleet = Fleet(tie_break=uuid.uuid4().hex)
        caches = KnownCaches(fleet)
        conversations = Conversations(caches, write_back=settings.frontend.write_back)
        streams = await stack.enter_async_context(WorkerStreams(channels, time.monotonic))
        cache_watch = await stack.enter_async_context(CacheWatch(caches, channels, frontend_id=fleet.tie_break))

        async def take_note(view: ClusterView) -> None:
            records = view.records()
            fleet.apply(records)
            conversations.note_workers(records, fleet.places())
            await cache_watch.retain(records)
            places = {Place.of(record) for record in records}
            await streams.retain(places)
            await channels.retain(places)

        watch = ClusterWatch(settings.control_plane.address, clock=time.monotonic, on_change=take_note)
        await stack.enter_async_context(background(watch.follow(), name="cluster_watch"))
        around = Surroundings(settings.frontend, streams, fleet, time.monotonic, fleet.tie_break, caches.signs)
        router = Router(settings.frontend.policy, always_hand_off=settings.frontend.handoff == "always")
        yield ClusterDispatcher(around, watch, conversations, Routing(fleet, router))


class ClusterDispatcher:
    """Implements `frontend.generation.Dispatcher` with the workers of the cluster.

    Attributes:
        residents: which prompts of global frontends are cached here.
    """

    def __init__(
        self, around: Surroundings, watch: ClusterWatch, conversations: Conversations, routing: Routing
    ) -> None:
        self.routing = routing
        self._around = around
        self._conversations = conversations
        self._watch = watch
        self._settings: FrontendSettings = around.settings
        self._migrations = Migrations(around.settings, around.clock)
        self.residents = ResidentPrefixes(conversations.resident_blocks)
        self._fallbacks_told: dict[str, tuple[float, int]] = {}

    @property
    def ready(self) -> bool:
        """Whether at least one decode worker takes requests now."""
        return bool(self._watch.view.ready(Role.ROLE_DECODE, self._around.clock()))

    def records(self) -> list[WorkerRecord]:
        """All workers in any state, as last heard of. Not copies: do not change them."""
        return self._watch.view.records()

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until `ready`.

        Raises:
            DeadlineError: it was not within `timeout_s`.
        """
        await self._watch.wait_ready(timeout_s)

    def models(self) -> list[ServedModel]:
        """Models with at least one ready decode worker, by name."""
        now_s = self._around.clock()
        decodes = self._watch.view.ready(Role.ROLE_DECODE, now_s)
        prefills = self._watch.view.ready(Role.ROLE_PREFILL, now_s)
        return [
            ServedModel(
                name=name,
                # The router sends what is long to the workers that take it.
                max_model_len=max(one.capacity.max_model_len for one in decodes if one.model == name),
                prefill_workers=sum(one.model == name for one in prefills),
                decode_workers=sum(one.model == name for one in decodes),
                created_unix_s=min(one.started_unix_s for one in decodes if one.model == name),
            )
            for name in sorted({one.model for one in decodes})
        ]

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream the answer; see `frontend.generation.Dispatcher`.

        Raises:
            ModelNotFoundError: no registered worker serves the model.
            NoWorkerError: some do, but none can take a request now.
            WorkerLostError: the workers that could were lost on the way.
            MigrationLimitError, MigrationBudgetError: others could, but it may not be sent to them.
            DeadlineError: the whole took longer than `frontend.request_timeout_s`.
            InvalidRequestError: a worker refused the request itself.
        """
        deadline_s = self._around.clock() + self._settings.request_timeout_s
        progress = Progress(request, self._settings.max_attempts, deadline_s, self._settings.max_migrations)
        chain = self._conversations.begin(request.model, request.token_ids, request.cache_salt)
        self._note_prefix(chain)
        with OPEN_REQUESTS.track_inprogress(), self._migrations.request():
            while True:
                attempt = await self._next_attempt(progress, chain)
                ending: TokenDelta | None = None
                try:
                    attempt.start()
                    while True:
                        event = await attempt.next_tokens()
                        delta = progress.accept(event, attempt)
                        if delta is None:
                            continue
                        if progress.silent_since_s is not None:
                            self._migrations.resumed(progress)
                        chain.extend(delta.token_ids)
                        self._note_event(event, attempt)
                        yield delta
                        if delta.finish_reason:
                            return
                except WorkerFailure as failure:
                    attempt.trace.failed(failure)
                    ending = self._after_failure(failure, progress, attempt)
                except ReplayDiverged:
                    self._migrations.diverged(progress)
                finally:
                    attempt.close()
                    self._note_attempt(attempt, progress, chain)
                if ending is not None:
                    yield ending
                    return

    async def _next_attempt(self, progress: Progress, chain: PrefixChain) -> Attempt:
        """The next dispatch. A request that has lost its worker waits for one to come; others do not."""
        while True:
            try:
                return self._attempt(progress, chain)
            except NoWorkerError as error:
                failure = progress.last_failure
                if failure is None:
                    raise
                if not self._migrations.waits(progress):
                    self._migrations.no_worker(progress)
                    raise failure.as_error(error.message) from error
            await asyncio.sleep(LOOK_AGAIN_S)

    def _note_prefix(self, chain: PrefixChain) -> None:
        record = current()
        if record is not None and record.prefix:
            self.residents.note(from_header(record.prefix), chain.tokens, chain.keys, chain.block_tokens)

    def _attempt(self, progress: Progress, chain: PrefixChain) -> Attempt:
        """The next dispatch, routed."""
        view, now_s = self._watch.view, self._around.clock()
        if not view.known:
            raise NoWorkerError("this frontend has not heard from the control plane yet", retry_after_s=RETRY_AFTER_S)
        record = current()

        def is_out(worker_id: str, epoch: int, kind: FailureKind) -> bool:
            """Until it is restarted; who was out of reach, until it has been seen to live."""
            return view.is_this(worker_id, epoch) and (
                kind is not FailureKind.LOST or view.is_suspect(worker_id, now_s)
            )

        ask = replace(
            progress.ask(is_out),
            known_by_slot=self._conversations.known(chain, self._around.fleet.slots),
            suspects=view.suspects(now_s),
            session=record.session if record is not None else "",
        )
        route = self._route(ask, progress)

        def note_computed(attempt: Attempt) -> None:
            PREFILL_SECONDS.observe(attempt.prefill_s)
            if progress.request.on_computed is not None:
                progress.request.on_computed()
            self._conversations.note_computed(attempt, chain)

        write_back = self._conversations.plan(ask, route, self._around.fleet)
        return Attempt(self._around, progress.job(), route, note_computed, write_back)

    def _route(self, ask: Ask, progress: Progress) -> Route:
        with stage("route"):
            route = progress.settle(self.routing.choose(ask, self._around.clock()))
        progress.attempts += 1
        note_route(route)
        decision = self.routing.decided(progress.request.request_id, ask, route, time.time())
        decision.after, decision.resumes = progress.after, len(progress.generated)
        if route.fallback is not None and progress.noted_fallback is None:
            progress.noted_fallback = route.fallback
            FALLBACKS.labels(route.fallback.value).inc()
            self._tell_fallback(progress.request.request_id, route.fallback.value)
        return route

    def _note_event(self, event: DecodeEvent, attempt: Attempt) -> None:
        if not event.finish_reason:
            return
        self._watch.view.absolve(attempt.route.decode.worker_id)
        if attempt.route.prefill is not None and attempt.computed is not None:
            self._watch.view.absolve(attempt.route.prefill.worker_id)
        if event.account.fallback and attempt.route.fallback is None:
            FALLBACKS.labels(DECODE_RECOMPUTED).inc()
            self._tell_fallback(attempt.job.request_id, event.account.fallback)

    def _tell_fallback(self, request_id: str, reason: str) -> None:
        """Now and then: where there is no prefill worker at all, each request would say so."""
        now_s = self._around.clock()
        told_s, untold = self._fallbacks_told.get(reason, (-FALLBACK_TOLD_EVERY_S, 0))
        if now_s - told_s < FALLBACK_TOLD_EVERY_S:
            self._fallbacks_told[reason] = told_s, untold + 1
            return
        self._fallbacks_told[reason] = now_s, 0
        log.warning("prefill_fallback", request_id=request_id, reason=reason, others_since_last=untold)

    def _note_attempt(self, attempt: Attempt, progress: Progress, chain: PrefixChain) -> None:
        """An attempt ended, in whatever way."""
        self.routing.ended(attempt)
        if progress.attempts > 1:
            self._migrations.attempt_ended(attempt, progress)
        lost = progress.last_failure
        if attempt.tokens_came and (lost is None or lost.worker.worker_id != attempt.route.decode.worker_id):
            self._conversations.note_answered(attempt, chain)
        ignored = attempt.ignored_failure
        if ignored is not None:
            self._note_failure(ignored, progress)

    def _after_failure(self, failure: WorkerFailure, progress: Progress, attempt: Attempt) -> TokenDelta | None:
        """Returns to dispatch again; an answer that was complete but for its end is ended here.

        Raises:
            SlipstreamError: the request cannot go on.
        """
        self._note_failure(failure, progress)
        # The frames it came through have the progress that keeps it: a cycle, with the prompt in it.
        failure.__traceback__ = None
        if failure.worker.role == Role.ROLE_DECODE:
            progress.last_failure = failure
            ending = progress.finished_unsaid()
            if ending is not None:
                return ending
        self._migrations.failed(failure, progress, attempt)
        return None

    def _note_failure(self, failure: WorkerFailure, progress: Progress) -> None:
        worker = failure.worker
        WORKER_FAILURES.labels(failure.role, failure.kind.value).inc()
        log.warning(
            "worker_failed",
            request_id=progress.request.request_id,
            worker_id=worker.worker_id,
            kind=failure.kind.value,
            reason=failure.cause.message,
            attempt=progress.attempts,
            tokens_passed=len(progress.generated),
        )
        if failure.kind.suspicious:
            self._watch.view.suspect(worker.worker_id, worker.epoch, self._around.clock())
