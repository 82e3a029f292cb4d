"""Clusters in virtual time: frontends that route with the real router, workers that run the real scheduler.

A request's way is the live system's: prefill and decode are asked at once, decode takes blocks when the prompt's
computation begins, blocks travel while the rest is computed, and decode starts when the last one has come. A worker
that dies takes its requests' places with it: they are dispatched again with what they have generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from engine.simulated.request import Event, EventKind, Request
from frontend.admission.cluster_room import others_of
from frontend.admission.in_flight import ClusterRoom
from frontend.router.ask import Ask
from frontend.router.route import Route
from frontend.write_back import plan
from simulator.deadlines import Deadlines
from simulator.event_loop import EventLoop
from simulator.feeds import Feeds
from simulator.frontend import Policy, SimulatedFrontend
from simulator.gate import SimulatedGate
from simulator.journey import Journey, KeptJourneys
from simulator.members import Members, Pool
from simulator.traces import Arrival
from simulator.transfers import Transfers
from simulator.underway import Underway, claim_of
from simulator.worker import SimulatedWorker
from slipstream.errors import DeadlineError, ModelNotFoundError, NoWorkerError, SlipstreamError, WorkerLostError
from slipstream.performance import Predictor, Profile
from slipstream.settings import AdmissionSettings
from slipstream.v1.registry_pb2 import Role

MODEL = "simulated"
MAX_MIGRATIONS = 3
"""Workers that may be lost with a request on board, as `frontend.max_migrations` has it by default."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model that a cluster serves.

    Attributes:
        policies: one for each frontend; the model's requests come to them in turn.
    """

    name: str
    prefill: Profile
    decode: Profile
    policies: Sequence[Policy]


class Watcher(Protocol):
    """Hears what becomes of requests, as it happens."""

    def arrived(self, under: Underway) -> None: ...
    def refused(self, under: Underway) -> None: ...
    def computed(self, under: Underway) -> None: ...
    def first_token(self, under: Underway) -> None: ...
    def ended(self, under: Underway) -> None:
        """Answered to its end, or failed: `journey.error` says which."""
        ...


class SimulatedCluster:
    """Serves arrivals, and tells its watchers what becomes of each.

    Args:
        models: what is served; arrivals that name no model are for the first.
        write_back: prefill fetches the beginning of a prompt from a worker that has it where that is faster.
        admission: in front of each frontend's dispatch; None: everything goes to the workers at once.
        request_timeout_s: longest a request may take; None: as long as it takes.
        step_by_step: see `SimulatedWorker`.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        write_back: bool = True,
        admission: AdmissionSettings | None = None,
        request_timeout_s: float | None = None,
        step_by_step: bool = False,
    ) -> None:
        self.loop = EventLoop()
        self.watchers: list[Watcher] = []
        self._write_back = write_back
        self._step_by_step = step_by_step
        self._timeout_s = request_timeout_s
        self._under: dict[str, Underway] = {}
        self._open = 0
        self._deadlines = Deadlines(self.loop, self._late)
        self._turns = dict.fromkeys((one.name for one in models), 0)
        self._more = True
        self._block_tokens = models[0].decode.block_tokens
        self.pools: dict[str, Pool] = {
            one.name: Pool(
                one.name,
                Predictor(one.prefill),
                Predictor(one.decode),
                [SimulatedFrontend(one.name, policy, f"frontend-{n}") for n, policy in enumerate(one.policies)],
            )
            for one in models
        }
        self.members = Members(self.loop, self.pools, self._build)
        self._feeds = Feeds(self.loop, self.members, self._under)
        self._transfers = Transfers(self.loop, self._block_tokens, self._received)
        self._default = models[0].name
        if admission is not None:
            for frontend in self.frontends:
                beside = len(self.pools[frontend.model].frontends)
                others = partial(others_of, frontend.fleet, beside) if beside > 1 else None
                room = _room_of(self.members, frontend.model)
                frontend.gate = SimulatedGate(admission, self.loop, self, room, others)

    @property
    def frontends(self) -> list[SimulatedFrontend]:
        """Of all models."""
        return [one for pool in self.pools.values() for one in pool.frontends]

    @property
    def workers(self) -> Mapping[str, SimulatedWorker]:
        """All that are there now, by id."""
        return {name: one.worker for name, one in self.members.present.items()}

    @property
    def busy(self) -> bool:
        """Whether anything is under way or still to come."""
        return self._more or self._open > 0

    def run(self, arrivals: Iterable[Arrival]) -> None:
        """Serve them all. Time stands still when the last one has left."""
        self._expect(iter(arrivals))
        self.loop.run()

    def _left(self) -> None:
        """A request has ended or was turned away."""
        self._open -= 1
        if not self.busy:
            self.loop.stop()

    def kill(self, worker_id: str) -> None:
        """A worker dies. Everybody hears of it at once, as of a connection that is closed."""
        dead = self.members.kill(worker_id)
        if dead is None:
            return
        touched = [one for one in self._under.values() if dead.worker in (one.prefill, one.decode)]
        for under in touched:
            if under.decode is dead.worker:
                self._decode_lost(under)
            else:
                self._prefill_lost(under)

    # -- the cluster --------------------------------------------------------------------------------------

    def _build(self, worker_id: str, role: Role.ValueType, predictor: Predictor) -> SimulatedWorker:
        return SimulatedWorker(
            self.loop,
            worker_id,
            role,
            predictor,
            on_event=self._on_event,
            on_begun=self._on_begun,
            step_by_step=self._step_by_step,
        )

    # -- a request's way ----------------------------------------------------------------------------------

    def _expect(self, stream: Iterator[Arrival]) -> None:
        arrival = next(stream, None)
        if arrival is None:
            self._more = False
        else:
            self.loop.at(arrival.at_s, self._arrive, arrival, stream)

    def expect(self, arrival: Arrival) -> None:
        """One more than `run` was given: of a client that comes back."""
        self._open += 1
        self.loop.at(arrival.at_s, self._come_back, arrival)

    def _come_back(self, arrival: Arrival) -> None:
        self._open -= 1
        self._enter(arrival)

    def _arrive(self, arrival: Arrival, stream: Iterator[Arrival]) -> None:
        self._expect(stream)
        self._enter(arrival)

    def _enter(self, arrival: Arrival) -> None:
        model = arrival.model or self._default
        pool = self.pools.get(model)
        if pool is None:
            raise ModelNotFoundError(f"the load asks for model {model!r}; there is {', '.join(self.pools)}")
        turn = self._turns[model]
        self._turns[model] = turn + 1
        frontend, now_s = pool.frontends[turn % len(pool.frontends)], self.loop.now_s
        deadline_s = now_s + self._timeout_s if self._timeout_s is not None else float("inf")
        claim = claim_of(arrival.service_class, arrival.tenant)
        under = Underway(claim, 0.0, 0.0, 0.0, now_s, deadline_s, journey=Journey(arrival), frontend=frontend)
        self._open += 1
        if self._timeout_s is not None:
            self._deadlines.watch(under)
        for watcher in self.watchers:
            watcher.arrived(under)
        if frontend.gate is None:
            self.send(under)
        else:
            under.on_recount = self._recount
            frontend.gate.arrive(under)

    def send(self, under: Underway) -> None:
        """Route it and give it to its workers. What cannot be is over."""
        frontend = under.frontend
        under.attempts += 1
        under.dispatches += 1
        under.journey.attempts = under.attempts
        arrival = under.journey.arrival
        under.request_id = arrival.request_id if under.attempts == 1 else f"{arrival.request_id}-{under.attempts}"
        ask = frontend.ask(arrival, under.prompt_tokens, self._block_tokens)
        try:
            route = frontend.policy.choose(ask, frontend.fleet, self.loop.now_s)
            self._under[under.request_id] = under
            self._dispatch(under, ask, route)
        except NoWorkerError as error:
            if under.attempts == 1:
                self.refuse(under, error)
            else:
                self._fail(under, error.code)
        except SlipstreamError as error:
            self._fail(under, error.code)

    def _dispatch(self, under: Underway, ask: Ask, route: Route) -> None:
        journey, now_s, members = under.journey, self.loop.now_s, self.members
        decode = under.decode = members[route.decode.worker_id].worker
        prefill = under.prefill = members[route.prefill.worker_id].worker if route.prefill is not None else None
        journey.reason, journey.decode = route.reason, decode.worker_id
        tokens = under.prompt_tokens
        # A policy that predicts nothing knows of no prefix.
        new_tokens = route.predicted.new_tokens if route.predicted is not None else tokens
        begin = under.frontend.fleet.begin
        under.decode_share = begin(decode.worker_id, tokens, 0 if prefill is not None else new_tokens, now_s)
        request = under.request(under.left_tokens, receives=prefill is not None)
        if prefill is None:
            decode.add(request)
            return
        journey.prefill = prefill.worker_id
        under.prefill_share = begin(prefill.worker_id, tokens, new_tokens, now_s)
        decode.add(request, expected=True)
        fleet = under.frontend.fleet
        fetched = plan(ask, route.prefill, fleet) if self._write_back and route.prefill is not None else None
        if fetched is not None:
            under.source, under.source_tokens = members[fetched.source.worker_id].worker, fetched.tokens
        prefill.add(under.request(0, receives=fetched is not None))

    def _on_begun(self, worker: SimulatedWorker, request: Request) -> None:
        under = self._under.get(request.request_id)
        if under is None:
            return
        if under.journey.begun_s < 0:
            under.journey.begun_s = self.loop.now_s
        if worker is under.prefill:
            assert under.decode is not None
            under.decode.started(request.request_id)
        elif under.prefill is not None and not under.received:
            under.received = True  # decode had all of it
            under.prefill.abort(request.request_id)
            self._leave_prefill(under, under.prefill)

    def _on_event(self, worker: SimulatedWorker, event: Event) -> None:
        under = self._under.get(event.request.request_id)
        if under is None:
            return
        if event.kind is EventKind.PREEMPTED:
            under.journey.preemptions += 1
        elif event.kind is EventKind.RECEIVING and worker is under.prefill:
            self._transfers.fetch(under, worker, event.request)
        elif event.kind is EventKind.RECEIVING:
            under.receiving = True
            self._transfers.hand_over(under)
        elif event.kind is EventKind.PROMPT_COMPUTED:
            self._computed(under, worker, event.request)
        elif event.kind is EventKind.FINISHED:
            self._finished(under, worker)
        self._feeds.tell(worker)

    def _computed(self, under: Underway, worker: SimulatedWorker, request: Request) -> None:
        journey, now_s = under.journey, self.loop.now_s
        if worker is under.prefill:
            if under.received:
                return
            journey.cached_tokens, journey.fetched_tokens = request.cached_tokens, request.received_tokens
            if under.prefill_share is not None:
                under.prefill_share.prompt_done(now_s)
            self._prompt_computed(under)
            self._transfers.hand_over(under)
            return
        if journey.computed_s < 0:
            journey.cached_tokens = request.cached_tokens
            self._prompt_computed(under)
        if under.decode_share is not None:
            under.decode_share.prompt_done(now_s)
        if journey.first_token_s < 0:
            journey.first_token_s = now_s
            for watcher in self.watchers:
                watcher.first_token(under)
        if under.frontend.gate is not None:
            under.frontend.gate.first_token(under)

    def _prompt_computed(self, under: Underway) -> None:
        under.journey.computed_s = self.loop.now_s
        for watcher in self.watchers:
            watcher.computed(under)
        if under.frontend.gate is not None:
            under.frontend.gate.computed(under)

    def _received(self, under: Underway, request_id: str, tokens: int) -> None:
        if under.request_id != request_id or under.prefill is None or under.decode is None:
            return
        under.decode.received(request_id, tokens)
        if under.prefill is not None:  # the woken worker may have ended it
            under.prefill.release(request_id)
            self._leave_prefill(under, under.prefill)

    def _leave_prefill(self, under: Underway, prefill: SimulatedWorker) -> None:
        if under.prefill_share is not None:
            under.prefill_share.end(self.loop.now_s)
        under.prefill = under.prefill_share = None
        self._feeds.tell(prefill)
        prefill.wake()
        self.members.end_if_drained(prefill)

    def _finished(self, under: Underway, worker: SimulatedWorker) -> None:
        journey = under.journey
        journey.ended_s = self.loop.now_s
        under.frontend.lengths.note(under.model, journey.arrival.output_tokens)
        self._over(under, journey.arrival.output_tokens)
        self.members.end_if_drained(worker)

    # -- what goes another way ----------------------------------------------------------------------------

    def refuse(self, under: Underway, error: SlipstreamError) -> None:
        """It is turned away before any worker had it."""
        under.journey.error, under.journey.refused = error.code, True
        under.journey.retry_after_s = error.retry_after_s or 0.0
        self._leave_workers(under)
        if under.frontend.gate is not None:
            under.frontend.gate.leave(under)
        for watcher in self.watchers:
            watcher.refused(under)
        self._left()

    def take_back(self, under: Underway) -> None:
        """Admission wants its place for another one: it goes on later from where it is."""
        self._recall(under)
        under.dispatches = 0

    def _recount(self, under: Underway) -> None:
        self._note_generated(under)
        assert under.frontend.gate is not None
        under.frontend.gate.count(under)

    def _note_generated(self, under: Underway) -> None:
        if under.decode is not None:
            under.attempt_tokens = under.decode.generated(under.request_id)

    def _prefill_lost(self, under: Underway) -> None:
        """Decode computes the prompt, unless it has it already."""
        decode = under.decode
        assert decode is not None
        if under.prefill_share is not None:
            under.prefill_share.end(self.loop.now_s)
        under.prefill, under.prefill_share = None, None
        request = decode.scheduler.get(under.request_id)
        if request is not None and not request.prompt_done:
            decode.failed(under.request_id)

    def _decode_lost(self, under: Underway) -> None:
        """The frontend asks another worker for the rest."""
        self._recall(under)
        if under.dispatches > MAX_MIGRATIONS:
            self._fail(under, WorkerLostError.default_code)
        else:
            self.send(under)

    def _recall(self, under: Underway) -> None:
        """Its workers have it no more; what was generated is kept."""
        self._note_generated(under)
        self._leave_workers(under)
        under.tokens += under.attempt_tokens
        under.attempt_tokens = 0

    def _leave_workers(self, under: Underway) -> None:
        self._under.pop(under.request_id, None)
        workers = under.prefill, under.decode
        for share in (under.prefill_share, under.decode_share):
            if share is not None:
                share.end(self.loop.now_s)
        under.forget_workers()
        for worker in workers:
            if worker is not None and worker.alive:
                worker.abort(under.request_id)
                worker.wake()
                self.members.end_if_drained(worker)

    def _fail(self, under: Underway, code: str) -> None:
        under.journey.error = code
        self._leave_workers(under)
        self._over(under, 0)

    def _late(self, under: Underway) -> None:
        self._fail(under, DeadlineError.default_code)

    def _over(self, under: Underway, answer_tokens: int) -> None:
        self._under.pop(under.request_id, None)
        for share in (under.prefill_share, under.decode_share):
            if share is not None:
                share.end(self.loop.now_s)
        self._left()
        if under.frontend.gate is not None:
            under.frontend.gate.leave(under, answer_tokens)
        for watcher in self.watchers:
            watcher.ended(under)


def fixed_cluster(
    profiles: tuple[Profile, Profile], counts: tuple[int, int], policies: Sequence[Policy], *, write_back: bool = True
) -> tuple[SimulatedCluster, KeptJourneys]:
    """One model's workers, prefill and decode, that stay what they are; nothing is in front of the router."""
    cluster = SimulatedCluster([ServedModel(MODEL, *profiles, policies)], write_back=write_back)
    cluster.members.begin(MODEL, *counts)
    kept = KeptJourneys()
    cluster.watchers.append(kept)
    return cluster, kept


def _room_of(members: Members, model: str) -> Callable[[], ClusterRoom]:
    return lambda: members.room(model)
