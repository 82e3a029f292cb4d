"""One worker in virtual time: the simulated engine's scheduler, stepped as its profile says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from engine.simulated.request import Event, Request, SchedulerLoad, Step
from engine.simulated.scheduler import Scheduler
from simulator.event_loop import EventLoop
from slipstream.performance import Predictor
from slipstream.v1.registry_pb2 import Role


@dataclass(slots=True)
class Work:
    """What a worker has done.

    Attributes:
        busy_s: time in which a step ran; prompt_s: in which it computed a prompt; generate_s: in which it generated.
        prompt_tokens: computed; cached_tokens: found in the prefix cache.
        decoded_tokens, decode_s: tokens of the steps that generated, and those steps' seconds times their batch: the
            quotient is the mean time between two tokens of a request.
    """

    busy_s: float = 0.0
    prompt_s: float = 0.0
    generate_s: float = 0.0
    steps: int = 0
    prompt_tokens: int = 0
    decoded_tokens: int = 0
    decode_s: float = 0.0


MOST_TICKS = 1 << 20


class SimulatedWorker:
    """Runs steps while there is something to compute, and tells its owner what came of each.

    Steps that only generate, and among which no answer ends, are one event; whatever comes meanwhile cuts it short
    at the tick that runs. So ask and tell the scheduler through this object: it first makes up for what is over.

    Args:
        step_by_step: one event for each step, as an engine has them; the same times, and far slower.
        on_event: called for each event of the scheduler, at the time at which it happens.
        on_begun: called when the first tokens of a prompt are about to be computed.
    """

    __slots__ = (
        "_loop",
        "_most_ticks",
        "_on_begun",
        "_on_event",
        "_step",
        "alive",
        "fed_s",
        "nic_free_s",
        "role",
        "scheduler",
        "work",
        "worker_id",
    )

    def __init__(
        self,
        loop: EventLoop,
        worker_id: str,
        role: Role.ValueType,
        predictor: Predictor,
        *,
        on_event: Callable[[SimulatedWorker, Event], None],
        on_begun: Callable[[SimulatedWorker, Request], None],
        step_by_step: bool = False,
    ) -> None:
        self._most_ticks = 1 if step_by_step else MOST_TICKS
        self._loop = loop
        self._on_event = on_event
        self._on_begun = on_begun
        self._step: Step | None = None
        self.alive = True
        """False once it was killed: no step of it ends any more."""
        self.worker_id = worker_id
        self.role = role
        self.scheduler = Scheduler(predictor.profile, predictor)
        self.work = Work()
        self.fed_s = -math.inf
        """When it last told its load."""
        self.nic_free_s = 0.0
        """When everything that it sends has left: what it sends goes one after the other."""

    def add(self, request: Request, *, expected: bool = False) -> None:
        """A request has arrived."""
        self.scheduler.add(request, self._loop.now_s, expected=expected)
        if not expected:
            self.wake()

    def started(self, request_id: str) -> None:
        """The sender of an expected prompt has begun to compute it."""
        self.scheduler.started(request_id)
        self.wake()

    def received(self, request_id: str, tokens: int) -> None:
        """Blocks have come, for that many tokens of a prompt."""
        self.catch_up()
        self.scheduler.received(request_id, tokens, self._loop.now_s)
        self.wake()

    def failed(self, request_id: str) -> None:
        """Nothing will come for a prompt."""
        self.catch_up()
        self.scheduler.failed(request_id, self._loop.now_s)
        self.wake()

    def release(self, request_id: str) -> None:
        """A computed prompt's blocks have been taken. Call `wake` when the rest is told."""
        self.catch_up()
        self.scheduler.release(request_id)

    def abort(self, request_id: str) -> None:
        """A request is of no use any more. Call `wake` when the rest is told."""
        self.catch_up()
        self.scheduler.abort(request_id)

    def load(self) -> SchedulerLoad:
        """What it does now."""
        self.catch_up()
        return self.scheduler.load()

    def generated(self, request_id: str) -> int:
        """Tokens of an answer so far; 0 of a request that is not here."""
        self.catch_up()
        request = self.scheduler.get(request_id)
        return self.scheduler.generated(request) if request is not None else 0

    def catch_up(self) -> None:
        """What is over of a step of many ticks is over."""
        step = self._step
        if step is None or step.ticks == 1:
            return
        began_s = step.started_s
        ticks = self.scheduler.catch_up(self._loop.now_s)
        if ticks:
            self._count(step, ticks, step.started_s - began_s)

    def wake(self) -> None:
        """Something changed: begin a step if none runs and there is anything to compute."""
        step = self._step
        if step is not None:
            if step.ticks > 1:
                self.catch_up()
                self._loop.at(self.scheduler.shorten(step, self._loop.now_s), self._finish, step)
            return
        if not self.alive:
            return
        step = self._step = self.scheduler.plan(self._loop.now_s, self._most_ticks)
        events = self.scheduler.take_events()
        if step is not None:
            self._loop.after(step.seconds, self._finish, step)
            for chunk in step.chunks:
                request = chunk.request
                if chunk.before == request.cached_tokens + request.received_tokens and not request.preemptions:
                    self._on_begun(self, request)
        self._tell(events)

    def busy_s(self) -> tuple[float, float]:
        """Seconds so far in which it computed prompts, and in which it generated; the step that runs counts in part."""
        prompt_s, generate_s, step = self.work.prompt_s, self.work.generate_s, self._step
        if step is not None:
            run_s = self._loop.now_s - step.started_s  # of several ticks, those that are over too
            prompt_s += run_s if step.chunks else 0.0
            generate_s += run_s if step.batch else 0.0
        return prompt_s, generate_s

    def kill(self) -> None:
        """It stops in the middle of whatever it does."""
        self.catch_up()
        self.alive = False
        self._step = None

    def _finish(self, step: Step) -> None:
        if step is not self._step:
            return
        self._step = None
        self._count(step, step.ticks, step.seconds)
        if step.chunks:
            self.work.prompt_tokens += sum(chunk.new_tokens for chunk in step.chunks)
        self._tell(self.scheduler.finish(step, self._loop.now_s))
        self.wake()

    def _count(self, step: Step, ticks: int, seconds: float) -> None:
        work = self.work
        work.steps += ticks
        work.busy_s += seconds
        if step.chunks:
            work.prompt_s += seconds
        if step.batch:
            work.generate_s += seconds
            work.decoded_tokens += ticks * step.batch
            work.decode_s += step.batch * seconds

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            self._on_event(self, event)
