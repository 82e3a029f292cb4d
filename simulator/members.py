"""The workers of a simulated cluster as they come, change and go: start, drain, role flip, death, and what they cost.

A worker occupies its GPUs from the call that starts it until it has ended. What it takes to start or to flip is passed
in by whoever asks for it; here is what follows from it for the frontends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from frontend.admission.in_flight import ClusterRoom
from simulator.event_loop import EventLoop
from simulator.frontend import SimulatedFrontend
from simulator.worker import SimulatedWorker
from slipstream.performance import Predictor, Profile
from slipstream.v1.registry_pb2 import Capacity, Role, TransferEndpoint, TransferPath, WorkerRecord, WorkerState


@dataclass(slots=True, eq=False)
class Pool:
    """One model's: its frontends, and what a new worker of each role is like."""

    model: str
    prefill: Predictor
    decode: Predictor
    frontends: Sequence[SimulatedFrontend]

    def predictor(self, role: Role.ValueType) -> Predictor:
        return self.prefill if role == Role.ROLE_PREFILL else self.decode


@dataclass(slots=True, eq=False)
class Member:
    """One worker, from its start to its end.

    Attributes:
        role: the one that it has or, while it starts or flips, will have.
        since_s: of its state and role.
        killed: it ended by dying.
    """

    worker: SimulatedWorker
    pool: Pool
    role: Role.ValueType
    state: WorkerState.ValueType
    started_s: float
    since_s: float
    gpus: int
    profile: Profile
    flips: int = 0
    ended_s: float | None = None
    killed: bool = False
    _reported: tuple[float, float] = field(default=(0.0, 0.0))

    @property
    def worker_id(self) -> str:
        return self.worker.worker_id

    @property
    def idle(self) -> bool:
        return not self.worker.scheduler.open_requests

    def busy_since_last_asked_s(self) -> tuple[float, float]:
        """Seconds in which it computed prompts and in which it generated, since the last call."""
        now = self.worker.busy_s()
        prompt_s, generate_s = now[0] - self._reported[0], now[1] - self._reported[1]
        self._reported = now
        return prompt_s, generate_s


class Members:
    """All workers there are, of all models.

    Args:
        build: makes a worker by its id, role and speed.
    """

    def __init__(
        self,
        loop: EventLoop,
        pools: Mapping[str, Pool],
        build: Callable[[str, Role.ValueType, Predictor], SimulatedWorker],
    ) -> None:
        self._loop = loop
        self._pools = pools
        self._build = build
        self._numbers: Counter[tuple[str, Role.ValueType]] = Counter()
        self._ended_gpu_s = 0.0
        self.present: dict[str, Member] = {}
        self.on_added: Callable[[Member], None] | None = None

    def __getitem__(self, worker_id: str) -> Member:
        return self.present[worker_id]

    def of(self, model: str) -> list[Member]:
        """One model's, in the order of their starts."""
        return [one for one in self.present.values() if one.pool.model == model]

    @property
    def gpus(self) -> int:
        """That are occupied now."""
        return sum(one.gpus for one in self.present.values())

    def gpus_of(self, model: str, role: Role.ValueType) -> int:
        """That a new worker would occupy."""
        return max(1, self._pools[model].predictor(role).profile.gpus)

    def gpu_s(self) -> float:
        """GPU-seconds so far."""
        now_s = self._loop.now_s
        return self._ended_gpu_s + sum((now_s - one.started_s) * one.gpus for one in self.present.values())

    def room(self, model: str) -> ClusterRoom:
        """What admission knows of a model's workers: `frontend.admission.cluster_room.room_of` without the records."""
        ready, prefill = WorkerState.READY, Role.ROLE_PREFILL  # looked up once: it takes longer than all the rest
        prefills = decodes = places = kv_tokens = open_requests = kv_tokens_used = 0
        for one in self.present.values():
            if one.pool.model != model or one.state != ready:
                continue
            if one.role == prefill:
                prefills += 1
                continue
            load, profile = one.worker.load(), one.profile
            decodes += 1
            places += profile.max_running
            kv_tokens += profile.blocks * profile.block_tokens
            open_requests += load.running + load.waiting
            kv_tokens_used += load.blocks_used * profile.block_tokens
        return ClusterRoom(prefills, decodes, places, kv_tokens, open_requests, kv_tokens_used)

    # -- what happens to a worker -------------------------------------------------------------------------

    def begin(self, model: str, prefill: int, decode: int) -> None:
        """So many workers are there from the beginning on."""
        roles = [Role.ROLE_PREFILL] * prefill + [Role.ROLE_DECODE] * decode
        started = [self._add(model, role, WorkerState.READY) for role in roles]
        for one in started:
            self._tell(one)

    def start(self, model: str, role: Role.ValueType, start_s: float) -> Member:
        """A new worker, ready after that time."""
        one = self._add(model, role, WorkerState.STARTING)
        self._loop.after(start_s, self._ready, one, one.flips)
        return one

    def _add(self, model: str, role: Role.ValueType, state: WorkerState.ValueType) -> Member:
        pool, now_s = self._pools[model], self._loop.now_s
        number = self._numbers[model, role]
        self._numbers[model, role] += 1
        name = f"{'prefill' if role == Role.ROLE_PREFILL else 'decode'}-{number}"
        worker_id = name if len(self._pools) == 1 else f"{model}-{name}"
        predictor = pool.predictor(role)
        worker = self._build(worker_id, role, predictor)
        gpus = self.gpus_of(model, role)
        one = self.present[worker_id] = Member(worker, pool, role, state, now_s, now_s, gpus, predictor.profile)
        if self.on_added is not None:
            self.on_added(one)
        return one

    def drain(self, worker_id: str) -> None:
        """It gets nothing new, finishes what it has and ends. Again, or of one that is gone: nothing."""
        one = self.present.get(worker_id)
        if one is None or one.state == WorkerState.DRAINING:
            return
        was_ready = one.state == WorkerState.READY
        self._enter(one, WorkerState.DRAINING)
        if was_ready:
            self._tell(one)
        self.end_if_drained(one.worker)

    def flip(self, worker_id: str, role: Role.ValueType, flip_s: float) -> bool:
        """It takes the other role after a pause; what it has it finishes, and its cache stays. False: it cannot."""
        one = self.present.get(worker_id)
        if one is None or one.state != WorkerState.READY or one.role == role:
            return False
        # For the frontends it drains until it says that it is ready in the other role.
        one.state = WorkerState.DRAINING
        self._tell(one)
        one.role, one.worker.role = role, role
        one.flips += 1
        self._enter(one, WorkerState.STARTING)
        self._loop.after(flip_s, self._ready, one, one.flips)
        return True

    def kill(self, worker_id: str) -> Member | None:
        """It dies: None when it is not there."""
        one = self.present.get(worker_id)
        if one is not None:
            one.worker.kill()
            one.killed = True
            self._end(one)
        return one

    def end_if_drained(self, worker: SimulatedWorker) -> None:
        """Call it whenever a request has left a worker."""
        one = self.present.get(worker.worker_id)
        if one is not None and one.state == WorkerState.DRAINING and one.idle:
            self._end(one)

    def _ready(self, one: Member, flips: int) -> None:
        if one.state != WorkerState.STARTING or one.ended_s is not None or one.flips != flips:
            return
        self._enter(one, WorkerState.READY)
        self._tell(one)
        # The others have measured the way from it, and it the ways from them.
        for other in self.of(one.pool.model):
            if other is not one and other.state != WorkerState.STARTING:
                self._tell(other)

    def _end(self, one: Member) -> None:
        one.ended_s = self._loop.now_s
        self._ended_gpu_s += (one.ended_s - one.started_s) * one.gpus
        del self.present[one.worker_id]
        for frontend in one.pool.frontends:
            frontend.remove(one.worker_id)

    def _enter(self, one: Member, state: WorkerState.ValueType) -> None:
        one.state, one.since_s = state, self._loop.now_s

    def _tell(self, one: Member) -> None:
        """Its frontends hear its newest record."""
        senders = [other for other in self.of(one.pool.model) if other.state != WorkerState.STARTING]
        record = _record(one, [_way(other) for other in senders])
        for frontend in one.pool.frontends:
            frontend.put(record, one.profile)


def _way(sender: Member) -> TransferPath:
    return TransferPath(
        peer_worker_id=sender.worker_id,
        peer_epoch=1,
        transport="nixl",
        bytes_per_s=sender.profile.transfer_bytes_per_s,
        latency_s=sender.profile.transfer_latency_s,
    )


def _record(one: Member, ways: Iterable[TransferPath]) -> WorkerRecord:
    profile = one.profile
    return WorkerRecord(
        worker_id=one.worker_id,
        role=one.role,
        state=one.state,
        model=one.pool.model,
        address="simulated:1",
        host_id=one.worker_id,
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
