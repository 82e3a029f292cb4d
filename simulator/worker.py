"""One worker in virtual time: the simulated engine's scheduler, stepped as its profile says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from engine.simulated.request import Event, Request, Step
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


class SimulatedWorker:
    """Runs steps while there is something to compute, and tells its owner what came of each.

    Args:
        on_event: called for each event of the scheduler, at the time at which it happens.
        on_begun: called when the first tokens of a prompt are about to be computed.
    """

    __slots__ = (
        "_loop",
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
    ) -> None:
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
        self.wake()

    def wake(self) -> None:
        """Something changed: begin a step if none runs and there is anything to compute."""
        if self._step is not None or not self.alive:
            return
        step = self._step = self.scheduler.plan(self._loop.now_s)
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
            run_s = self._loop.now_s - step.started_s
            prompt_s += run_s if step.chunks else 0.0
            generate_s += run_s if step.batch else 0.0
        return prompt_s, generate_s

    def kill(self) -> None:
        """It stops in the middle of whatever it does."""
        self.alive = False
        self._step = None

    def _finish(self, step: Step) -> None:
        if step is not self._step:
            return
        self._step = None
        work = self.work
        work.steps += 1
        work.busy_s += step.seconds
        work.prompt_s += step.seconds if step.chunks else 0.0
        work.generate_s += step.seconds if step.batch else 0.0
        work.prompt_tokens += sum(chunk.new_tokens for chunk in step.chunks)
        work.decoded_tokens += step.batch
        work.decode_s += step.batch * step.seconds
        self._tell(self.scheduler.finish(step, self._loop.now_s))
        self.wake()

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            self._on_event(self, event)
