"""A cluster in virtual time: frontends that route with the real router, workers that run the real scheduler.

A request's way is the live system's: prefill and decode are asked at once, decode takes blocks when the prompt's
computation begins, blocks travel while the rest is computed, and decode starts when the last one has come.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engine.simulated.request import Event, EventKind, Request
from frontend.block_index import BlockIndex
from frontend.router.ask import Ask
from frontend.router.candidate import Share
from frontend.router.fleet import Fleet
from frontend.router.learning import AnswerLengths
from frontend.router.route import Route
from frontend.write_back import plan
from simulator.event_loop import EventLoop
from simulator.journey import Journey
from simulator.traces import Arrival
from simulator.worker import SimulatedWorker
from slipstream.errors import SlipstreamError
from slipstream.performance import Predictor, Profile
from slipstream.v1.registry_pb2 import Capacity, Load, Role, TransferEndpoint, TransferPath, WorkerRecord, WorkerState

MODEL = "simulated"
FEED_INTERVAL_S = 0.1
"""How often a frontend hears a worker's load; its own requests it knows at once."""


class Policy(Protocol):
    """What decides; the live frontend's policies are of this shape."""

    def choose(self, ask: Ask, fleet: Fleet, now_s: float) -> Route: ...


@dataclass(slots=True, eq=False)
class _Under:
    """A request that is under way: its record, its two halves and its shares of the workers' work."""

    journey: Journey
    frontend: SimulatedFrontend
    prefill: SimulatedWorker | None
    decode: SimulatedWorker
    prefill_share: Share | None = None
    decode_share: Share | None = None
    source: SimulatedWorker | None = None
    source_tokens: int = 0
    receiving: bool = False
    received: bool = False


@dataclass(slots=True, eq=False)
class SimulatedFrontend:
    """One frontend: its view of the workers, its policy, and the index of what they have cached."""

    policy: Policy
    fleet: Fleet
    index: BlockIndex = field(default_factory=BlockIndex)
    owners: dict[str, int] = field(default_factory=dict)
    lengths: AnswerLengths = field(default_factory=AnswerLengths)

    def ask(self, arrival: Arrival, block_tokens: int) -> Ask:
        # Owners are entered as slots are given out: each one's place is its number.
        known = self.index.match(arrival.keys).spread(self.fleet.slots, np.arange(self.fleet.slots)) * block_tokens
        return Ask(
            MODEL,
            arrival.input_tokens,
            known_by_slot=known,
            session=arrival.session,
            expected_tokens=self.lengths.of(MODEL),
        )


class SimulatedCluster:
    """Serves arrivals; `journeys` holds what became of each.

    Args:
        profiles: of the prefill and the decode workers.
        policies: one for each frontend; requests come to the frontends in turn.
        write_back: prefill fetches the beginning of a prompt from a worker that has it where that is faster.
    """

    def __init__(
        self,
        profiles: tuple[Profile, Profile],
        counts: tuple[int, int],
        policies: Iterable[Policy],
        *,
        write_back: bool = True,
    ) -> None:
        self.loop = EventLoop()
        self.journeys: list[Journey] = []
        self.workers: dict[str, SimulatedWorker] = {}
        self.frontends = [SimulatedFrontend(policy, Fleet(f"frontend-{n}")) for n, policy in enumerate(policies)]
        self._write_back = write_back
        self._under: dict[str, _Under] = {}
        self._fed_s: dict[str, float] = {}
        self._block_tokens = profiles[1].block_tokens
        self._block_bytes = profiles[0].block_bytes
        prefill, decode = (Predictor(profile) for profile in profiles)
        prefill_ids = [f"prefill-{number}" for number in range(counts[0])]
        decode_ids = [f"decode-{number}" for number in range(counts[1])]
        ways = [_way(sender, prefill.profile) for sender in prefill_ids]
        ways += [_way(sender, decode.profile) for sender in decode_ids]
        for worker_id in prefill_ids:
            self._add_worker(_record(worker_id, Role.ROLE_PREFILL, prefill.profile, ways), prefill)
        for worker_id in decode_ids:
            self._add_worker(_record(worker_id, Role.ROLE_DECODE, decode.profile, ways), decode)

    def run(self, arrivals: Iterable[Arrival]) -> list[Journey]:
        """Serve them all; returns their journeys in the order of arrival."""
        stream = iter(arrivals)
        self._expect(next(stream, None), stream)
        self.loop.run()
        return self.journeys

    # -- the cluster --------------------------------------------------------------------------------------

    def _add_worker(self, record: WorkerRecord, predictor: Predictor) -> None:
        worker_id = record.worker_id
        self.workers[worker_id] = SimulatedWorker(
            self.loop, worker_id, record.role, predictor, on_event=self._on_event, on_begun=self._on_begun
        )
        self._fed_s[worker_id] = -FEED_INTERVAL_S
        for frontend in self.frontends:
            one = frontend.fleet.put(record)
            frontend.fleet.note_profile(worker_id, predictor.profile)
            owner = frontend.index.enter()
            assert owner == one.slot, "owners and slots are given out in one order"
            frontend.owners[worker_id] = owner

    def _feed(self, worker: SimulatedWorker) -> None:
        """What the worker tells the frontends after a step."""
        stored, removed = worker.scheduler.drain_cache_events()
        for frontend in self.frontends if stored or removed else ():
            owner = frontend.owners[worker.worker_id]
            if removed:
                frontend.index.remove(owner, np.array(removed, np.uint64))
            if stored:
                frontend.index.store(owner, np.array(stored, np.uint64))
        now_s = self.loop.now_s
        if now_s - self._fed_s[worker.worker_id] < FEED_INTERVAL_S:
            return
        self._fed_s[worker.worker_id] = now_s
        load = worker.scheduler.load()
        said = Load(
            running=load.running,
            waiting=load.waiting,
            blocks_used=load.blocks_used,
            waiting_tokens=load.waiting_tokens,
            context_tokens=load.context_tokens,
        )
        for frontend in self.frontends:
            frontend.fleet.note_load(worker.worker_id, said, self._own(worker, frontend, said))

    def _own(self, worker: SimulatedWorker, frontend: SimulatedFrontend, said: Load) -> Load:
        if len(self.frontends) == 1:
            return said
        mine = [
            one
            for one in self._under.values()
            if one.frontend is frontend and worker in (one.prefill, one.decode) and one.journey.ended_s < 0
        ]
        waiting = sum(one.journey.arrival.input_tokens for one in mine if one.journey.computed_s < 0)
        context = sum(one.journey.arrival.input_tokens for one in mine if one.decode is worker)
        return Load(running=len(mine), waiting_tokens=waiting, context_tokens=context)

    # -- a request's way ----------------------------------------------------------------------------------

    def _expect(self, arrival: Arrival | None, stream: Iterable[Arrival]) -> None:
        if arrival is not None:
            self.loop.at(arrival.at_s, self._arrive, arrival, stream)

    def _arrive(self, arrival: Arrival, stream: Iterable[Arrival]) -> None:
        self._expect(next(iter(stream), None), stream)
        journey = Journey(arrival)
        frontend = self.frontends[len(self.journeys) % len(self.frontends)]
        self.journeys.append(journey)
        try:
            ask = frontend.ask(arrival, self._block_tokens)
            self._dispatch(journey, frontend, ask, frontend.policy.choose(ask, frontend.fleet, self.loop.now_s))
        except SlipstreamError as error:
            journey.error = error.code

    def _dispatch(self, journey: Journey, frontend: SimulatedFrontend, ask: Ask, route: Route) -> None:
        arrival, now_s = journey.arrival, self.loop.now_s
        decode = self.workers[route.decode.worker_id]
        prefill = self.workers[route.prefill.worker_id] if route.prefill is not None else None
        journey.reason, journey.decode = route.reason, decode.worker_id
        under = self._under[arrival.request_id] = _Under(journey, frontend, prefill, decode)
        tokens = arrival.input_tokens
        # A policy that predicts nothing knows of no prefix.
        new_tokens = route.predicted.new_tokens if route.predicted is not None else tokens
        begin = frontend.fleet.begin
        under.decode_share = begin(decode.worker_id, tokens, 0 if prefill is not None else new_tokens, now_s)
        request = Request(
            arrival.request_id,
            arrival.input_tokens,
            arrival.output_tokens,
            list(arrival.keys),
            receives=prefill is not None,
        )
        if prefill is None:
            decode.add(request)
            return
        journey.prefill = prefill.worker_id
        under.prefill_share = begin(prefill.worker_id, tokens, new_tokens, now_s)
        decode.add(request, expected=True)
        fetched = plan(ask, route.prefill, frontend.fleet) if self._write_back and route.prefill is not None else None
        if fetched is not None:
            under.source, under.source_tokens = self.workers[fetched.source.worker_id], fetched.tokens
        keys, receives = list(arrival.keys), fetched is not None
        prefill.add(Request(arrival.request_id, arrival.input_tokens, 0, keys, receives=receives))

    def _on_begun(self, worker: SimulatedWorker, request: Request) -> None:
        under = self._under[request.request_id]
        if under.journey.begun_s < 0:
            under.journey.begun_s = self.loop.now_s
        if worker is under.prefill:
            under.decode.scheduler.started(request.request_id)
            under.decode.wake()
        elif under.prefill is not None and not under.received:
            under.received = True  # decode had all of it
            under.prefill.scheduler.abort(request.request_id)
            self._leave_prefill(under, under.prefill)

    def _on_event(self, worker: SimulatedWorker, event: Event) -> None:
        under = self._under.get(event.request.request_id)
        if under is None:
            return
        if event.kind is EventKind.PREEMPTED:
            under.journey.preemptions += 1
        elif event.kind is EventKind.RECEIVING and worker is under.prefill:
            self._fetch(under, worker, event.request)
        elif event.kind is EventKind.RECEIVING:
            under.receiving = True
            self._send(under)
        elif event.kind is EventKind.PROMPT_COMPUTED:
            self._computed(under, worker, event.request)
        elif event.kind is EventKind.FINISHED:
            self._finished(under)
        self._feed(worker)

    def _computed(self, under: _Under, worker: SimulatedWorker, request: Request) -> None:
        journey, now_s = under.journey, self.loop.now_s
        if worker is under.prefill:
            if under.received:
                return
            journey.computed_s = now_s
            journey.cached_tokens, journey.fetched_tokens = request.cached_tokens, request.received_tokens
            if under.prefill_share is not None:
                under.prefill_share.prompt_done(now_s)
            self._send(under)
            return
        journey.first_token_s = now_s
        if journey.computed_s < 0:
            journey.computed_s, journey.cached_tokens = now_s, request.cached_tokens
            if under.decode_share is not None:
                under.decode_share.prompt_done(now_s)

    def _fetch(self, under: _Under, prefill: SimulatedWorker, request: Request) -> None:
        """The prompt's beginning comes from a worker that has it, as far as it still does."""
        source, now_s = under.source, self.loop.now_s
        assert source is not None, "prefill receives from a source only"
        pool, profile = source.scheduler.pool, source.scheduler.profile
        blocks = pool.match(request.keys, under.source_tokens // self._block_tokens)
        pool.hold(blocks)
        pool.give_back(blocks)  # used just now: they go last
        tokens = max(0, len(blocks) * self._block_tokens - request.done)
        moved_bytes = tokens // self._block_tokens * self._block_bytes
        source.nic_free_s = max(now_s, source.nic_free_s) + moved_bytes / profile.transfer_bytes_per_s
        self.loop.at(source.nic_free_s + profile.transfer_latency_s, self._fetched, prefill, request, tokens)

    def _fetched(self, prefill: SimulatedWorker, request: Request, tokens: int) -> None:
        prefill.scheduler.received(request.request_id, tokens, self.loop.now_s)
        prefill.wake()

    def _send(self, under: _Under) -> None:
        """Once decode has blocks and the prompt is computed it is known when the last block will have come."""
        journey, prefill = under.journey, under.prefill
        if not under.receiving or journey.computed_s < 0 or prefill is None or under.received:
            return
        under.received = True
        request = under.decode.scheduler.get(journey.arrival.request_id)
        missing = journey.arrival.input_tokens - (request.done if request is not None else 0)
        moved_bytes = missing / self._block_tokens * self._block_bytes
        profile = prefill.scheduler.profile
        travel_s = moved_bytes / profile.transfer_bytes_per_s
        # While the prompt was computed its blocks were under way already, as far as the others' left room for them.
        left_s = max(journey.begun_s, prefill.nic_free_s) + travel_s
        prefill.nic_free_s = max(prefill.nic_free_s, left_s)
        last_chunk_s = min(travel_s, profile.step_tokens / max(1, missing) * travel_s)
        here_s = max(left_s, self.loop.now_s + last_chunk_s) + profile.transfer_latency_s
        self.loop.at(here_s, self._received, under, missing)

    def _received(self, under: _Under, tokens: int) -> None:
        request_id = under.journey.arrival.request_id
        under.decode.scheduler.received(request_id, tokens, self.loop.now_s)
        under.decode.wake()
        assert under.prefill is not None
        under.prefill.scheduler.release(request_id)
        self._leave_prefill(under, under.prefill)

    def _leave_prefill(self, under: _Under, prefill: SimulatedWorker) -> None:
        if under.prefill_share is not None:
            under.prefill_share.end(self.loop.now_s)
        self._feed(prefill)
        prefill.wake()

    def _finished(self, under: _Under) -> None:
        journey = under.journey
        journey.ended_s = self.loop.now_s
        if under.decode_share is not None:
            under.decode_share.end(self.loop.now_s)
        under.frontend.lengths.note(MODEL, journey.arrival.output_tokens)
        del self._under[journey.arrival.request_id]


def _way(sender: str, profile: Profile) -> TransferPath:
    return TransferPath(
        peer_worker_id=sender,
        peer_epoch=1,
        transport="nixl",
        bytes_per_s=profile.transfer_bytes_per_s,
        latency_s=profile.transfer_latency_s,
    )


def _record(worker_id: str, role: Role.ValueType, profile: Profile, ways: Iterable[TransferPath] = ()) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        role=role,
        state=WorkerState.READY,
        model=MODEL,
        address="simulated:1",
        host_id=worker_id,
        epoch=1,
        capacity=Capacity(
            max_model_len=profile.max_model_len,
            block_tokens=profile.block_tokens,
            blocks=profile.blocks,
            block_bytes=profile.block_bytes,
            max_running=profile.max_running,
        ),
        transfer=TransferEndpoint(address="simulated:1", epoch=1, transports=["nixl"]),
        paths=ways,
    )
