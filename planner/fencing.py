"""Which sick workers get nothing new from now on, and which may have work again. Pure: the time is passed in.

Taking capacity away can do more harm than a sick worker does, and what makes one look sick may make all look so: a
broken driver, a wrong limit, a hot hall. So fencing has a budget, of a share of each pool and of a number an hour, and
no pool is left without a healthy worker that is ready. What goes beyond is told to people and left as it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from slipstream.v1.registry_pb2 import HealthState, Role, WorkerRecord, WorkerState
from slipstream.worker_settings import HealthSettings

HOUR_S = 3600.0
UNSEEN_S = 10.0
"""How long an order to a worker counts as carried out although its record does not say so yet."""
HELD = {
    "last": "no other healthy worker of its pool is ready",
    "share": "as much of its pool is fenced as may be (health.most_fenced_share)",
    "budget": "as many workers were fenced within the hour as may be (health.replacements_per_hour)",
    "off": "fencing is switched off (health.fence)",
}


@dataclass(frozen=True, slots=True)
class Orders:
    """What to do now.

    Attributes:
        fence: these, and why.
        free: these are well again.
        held: of the other sick ones, by id, which of `HELD` keeps them in service.
    """

    fence: tuple[tuple[WorkerRecord, str], ...] = ()
    free: tuple[WorkerRecord, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)


class Fencing:
    """Decides, and remembers what was fenced within the hour."""

    def __init__(self, limits: HealthSettings) -> None:
        self._limits = limits
        self._fenced: dict[tuple[str, int], float] = {}
        self._ordered: dict[tuple[str, int], float] = {}

    def left(self, now_s: float) -> int:
        """How many more may be fenced within this hour."""
        return max(0, self._limits.replacements_per_hour - self._spent(now_s))

    def decide(self, records: Sequence[WorkerRecord], slow: Mapping[str, str], now_s: float, unix_s: float) -> Orders:
        """Call it in order of time.

        Args:
            records: all workers, as the registry has them.
            slow: by worker, why it is taken to be sick although its device says nothing.
            unix_s: the same moment as workers tell it.
        """
        self._remember(records, now_s, unix_s)
        pools: dict[tuple[str, Role.ValueType], list[WorkerRecord]] = defaultdict(list)
        for record in records:
            pools[record.model, record.role].append(record)
        fence, free, held = list[tuple[WorkerRecord, str]](), list[WorkerRecord](), dict[str, str]()
        for _, pool in sorted(pools.items()):
            for record, word in self._of_pool(pool, slow, now_s, len(fence)):
                if word == "fence":
                    fence.append((record, because(record, slow)))
                elif word == "free":
                    free.append(record)
                else:
                    held[record.worker_id] = word
        return Orders(tuple(fence), tuple(free), held)

    def fenced(self, record: WorkerRecord, now_s: float) -> None:
        """An order to fence was carried out."""
        self._fenced[_name(record)] = self._ordered[_name(record)] = now_s

    def _of_pool(
        self, pool: Iterable[WorkerRecord], slow: Mapping[str, str], now_s: float, before: int
    ) -> Iterable[tuple[WorkerRecord, str]]:
        fenced = [one for one in pool if self._is_fenced(one, now_s)]
        ready = [one for one in pool if one.state == WorkerState.READY and one not in fenced]
        yield from ((one, "free") for one in fenced if one.state == WorkerState.FENCED and not is_sick(one, slow))
        sick = sorted((one for one in ready if is_sick(one, slow)), key=_longest_first)
        count, spent = len(fenced), before + self._spent(now_s)
        most = max(1, math.floor(self._limits.most_fenced_share * (len(ready) + len(fenced))))
        for one in sick:
            if not self._limits.fence:
                yield one, "off"
            elif len(sick) == len(ready):
                yield one, "last"
            elif count >= most:
                yield one, "share"
            elif spent >= self._limits.replacements_per_hour:
                yield one, "budget"
            else:
                count, spent = count + 1, spent + 1
                yield one, "fence"

    def _is_fenced(self, record: WorkerRecord, now_s: float) -> bool:
        ordered_s = self._ordered.get(_name(record), -math.inf)
        return record.state == WorkerState.FENCED or (
            record.state == WorkerState.READY and now_s - ordered_s < UNSEEN_S
        )

    def _remember(self, records: Iterable[WorkerRecord], now_s: float, unix_s: float) -> None:
        """Also what was fenced before this process began, as far as it is still there.

        Of one that is still fenced the time stays known: asked for it again, after a jump of its clock, it might say
        that it was fenced just now.
        """
        still = {_name(record): record.health.fenced_unix_s for record in records if record.state == WorkerState.FENCED}
        for name, fenced_unix_s in still.items():
            self._fenced.setdefault(name, now_s - max(0.0, unix_s - fenced_unix_s))
        self._fenced = {name: at_s for name, at_s in self._fenced.items() if name in still or now_s - at_s < HOUR_S}
        self._ordered = {name: at_s for name, at_s in self._ordered.items() if now_s - at_s < UNSEEN_S}

    def _spent(self, now_s: float) -> int:
        return sum(now_s - at_s < HOUR_S for at_s in self._fenced.values())


def is_sick(record: WorkerRecord, slow: Mapping[str, str]) -> bool:
    """By its own word, or by its peers'."""
    return record.health.state == HealthState.SICK or record.worker_id in slow


def because(record: WorkerRecord, slow: Mapping[str, str]) -> str:
    """Why, for people: the gravest first."""
    reasons = [one.text for one in record.health.reasons if one.state == HealthState.SICK]
    if record.worker_id in slow:
        reasons.append(slow[record.worker_id])
    text = "; ".join(reasons) or "it says that it is sick"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _name(record: WorkerRecord) -> tuple[str, int]:
    return record.worker_id, record.epoch


def _longest_first(record: WorkerRecord) -> tuple[int, str]:
    return record.health.since_unix_s, record.worker_id
