"""From counts to actions: which worker is flipped, drained or started, and what is on its way already.

Flips come first, they take no time; new workers second. Whoever loses least is taken: the one with the fewest requests,
and among these the youngest, whose cache is the coldest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.observation import WorkerSeen
from planner.scaling import Action, Counts, Drain, Flip, Start
from slipstream.v1.registry_pb2 import Role, WorkerState

UNSEEN_S = 30.0
"""How long an action counts as done although nothing of it is seen: registries and processes take a moment."""

PREFILL, DECODE = Role.ROLE_PREFILL, Role.ROLE_DECODE


@dataclass(slots=True)
class _Asked:
    at_s: float
    role: Role.ValueType | None  # None: to drain


class Coming:
    """One model's actions that were decided and are not seen yet.

    Attributes:
        start_s: what the workers that were seen to start took until they were ready; before the first, what those
            that are ready say of their own start; 0 when nothing is known.
    """

    __slots__ = ("_asked", "_known", "_starting", "_starts", "start_s")

    def __init__(self) -> None:
        self.start_s = 0.0
        self._starting: dict[str, float] = {}
        self._asked: dict[str, _Asked] = {}
        self._starts: list[tuple[float, Role.ValueType]] = []
        self._known: set[str] = set()

    def seen(self, workers: Sequence[WorkerSeen], at_s: float) -> list[WorkerSeen]:
        """The workers as they will be once everything that was decided is seen; started ones only in `starts`."""
        ids = {one.worker_id for one in workers}
        for one in workers:
            if one.worker_id not in self._known:
                self._arrived(one.role)
        self._known = ids
        self._time_starts(workers, at_s)
        self._starts = [start for start in self._starts if at_s - start[0] < UNSEEN_S]
        self._asked = {
            worker_id: asked
            for worker_id, asked in self._asked.items()
            if worker_id in ids and at_s - asked.at_s < UNSEEN_S
        }
        return [self._as_asked(one) for one in workers]

    @property
    def starts(self) -> Counts:
        """New workers that were asked for and have not shown up."""
        prefill = sum(1 for _, role in self._starts if role == PREFILL)
        return Counts(prefill, len(self._starts) - prefill)

    def note(self, action: Action, at_s: float) -> None:
        """It was decided now."""
        if isinstance(action, Start):
            self._starts.append((at_s, action.role))
        elif isinstance(action, Flip):
            self._asked[action.worker_id] = _Asked(at_s, action.role)
        else:
            self._asked[action.worker_id] = _Asked(at_s, None)

    def forget(self, action: Action) -> None:
        """It was decided, and will not be done: another planner acts, or it failed."""
        if not isinstance(action, Start):
            self._asked.pop(action.worker_id, None)
            return
        for place in reversed(range(len(self._starts))):
            if self._starts[place][1] == action.role:
                del self._starts[place]
                return

    def _arrived(self, role: Role.ValueType) -> None:
        for place, (_, wanted) in enumerate(self._starts):
            if wanted == role:
                del self._starts[place]
                return

    def _time_starts(self, workers: Sequence[WorkerSeen], at_s: float) -> None:
        before, self._starting = self._starting, {}
        for one in workers:
            if one.state == WorkerState.STARTING:
                self._starting[one.worker_id] = before.get(one.worker_id, min(one.since_s, at_s))
            elif one.state == WorkerState.READY and one.worker_id in before:
                took_s = max(0.0, one.since_s - before[one.worker_id])
                # Plans must last for the slow ones: what takes longer is believed at once, what does not by degrees.
                self.start_s = max(took_s, self.start_s + 0.2 * (took_s - self.start_s))
        if self.start_s == 0.0:
            told = (one.start_s for one in workers if one.state == WorkerState.READY)
            self.start_s = max(told, default=0.0)

    def _as_asked(self, one: WorkerSeen) -> WorkerSeen:
        asked = self._asked.get(one.worker_id)
        if asked is None or one.state == WorkerState.DRAINING:
            return one
        if asked.role is None:
            return replace(one, state=WorkerState.DRAINING)
        return one if one.role == asked.role else replace(one, role=asked.role)


@dataclass(frozen=True, slots=True)
class Limits:
    """What is allowed now.

    Attributes:
        gpus: that new workers may take.
        gpus_each: of a prefill and of a decode worker.
        room: more workers that each role may have.
        ups, downs, flips: most actions of the kind.
    """

    gpus: int
    gpus_each: tuple[int, int]
    room: Counts
    ups: int
    downs: int
    flips: int
    actions: int


def steps(
    model: str, workers: Sequence[WorkerSeen], starts: Counts, target: Counts, limits: Limits
) -> tuple[list[Action], str]:
    """The actions that are taken now, and what kept others from being taken, for people."""
    pools = {role: _pool(workers, role) for role in (PREFILL, DECODE)}
    short = {
        PREFILL: target.prefill - len(pools[PREFILL]) - starts.prefill,
        DECODE: target.decode - len(pools[DECODE]) - starts.decode,
    }
    actions: list[Action] = []
    held = []
    flips, gpus = limits.flips, limits.gpus
    room = {PREFILL: limits.room.prefill, DECODE: limits.room.decode}
    for role, other in ((PREFILL, DECODE), (DECODE, PREFILL)):
        # Those that stay take over at once what came to all: not more than half of them go in one step.
        flips = min(flips, max(1, len(pools[other]) // 2)) if short[role] > 0 else flips
        # And never the last that is ready, while others only start: nobody would serve until they do.
        left = min(1, target.decode if other == DECODE else target.prefill)
        while short[role] > 0 and short[other] < 0:
            ready = [one for one in pools[other] if one.state == WorkerState.READY]
            if len(ready) <= left or flips == 0 or room[role] <= 0 or len(actions) >= limits.actions:
                held.append("flip")
                break
            one = min(ready, key=_loss)
            pools[other].remove(one)
            actions.append(Flip(one.worker_id, role))
            short[role] -= 1
            short[other] += 1
            room[role] -= 1
            flips -= 1
    # A role that waits for a flip neither gets a new worker nor loses one.
    waiting = "flip" in held
    ups, downs = limits.ups, limits.downs
    # The scarcer role first, so that a budget that does not suffice for all is not used up by one.
    for role in sorted((PREFILL, DECODE), key=lambda one: -short[one]):
        each = limits.gpus_each[0 if role == PREFILL else 1]
        while short[role] > 0 and not waiting:
            if len(actions) >= limits.actions or ups == 0 or gpus < each or room[role] <= 0:
                held.append("start: no GPU is free" if gpus < each else "start")
                break
            actions.append(Start(model, role))
            short[role] -= 1
            room[role] -= 1
            ups -= 1
            gpus -= each
        while short[role] < 0 and not waiting and pools[role]:
            if len(actions) >= limits.actions or downs == 0:
                held.append("drain")
                break
            one = min(pools[role], key=_drain_loss)
            pools[role].remove(one)
            actions.append(Drain(one.worker_id))
            short[role] += 1
            downs -= 1
    return actions, ", ".join(dict.fromkeys(held))


def counts_of(workers: Sequence[WorkerSeen], starts: Counts) -> Counts:
    """Workers that are or will be ready, without those that end."""
    return Counts(len(_pool(workers, PREFILL)) + starts.prefill, len(_pool(workers, DECODE)) + starts.decode)


def room(seen: Sequence[WorkerSeen], workers: Sequence[WorkerSeen], starts: Counts, most: Counts) -> Counts:
    """More workers that each role may have, also if a flip that was decided never happens.

    Args:
        seen: as they are; workers: as they will be.
    """
    left = {}
    for role, coming, limit in ((PREFILL, starts.prefill, most.prefill), (DECODE, starts.decode, most.decode)):
        ids = {one.worker_id for one in (*_pool(seen, role), *_pool(workers, role))}
        left[role] = max(0, limit - len(ids) - coming)
    return Counts(left[PREFILL], left[DECODE])


def _pool(workers: Sequence[WorkerSeen], role: Role.ValueType) -> list[WorkerSeen]:
    return [one for one in workers if one.role == role and one.state != WorkerState.DRAINING]


def _loss(one: WorkerSeen) -> tuple[int, int, float, str]:
    return (one.running + one.waiting, one.context_tokens + one.waiting_tokens, -one.since_s, one.worker_id)


def _drain_loss(one: WorkerSeen) -> tuple[bool, tuple[int, int, float, str]]:
    """One that is still starting has nothing to lose."""
    return (one.state == WorkerState.READY, _loss(one))
