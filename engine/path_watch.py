"""Measures the way from each peer to this worker when the two meet, so that a slow road is known before it is used.

`PeerBook` is the pure part: which peers there are, what was measured, who is due next. `PathWatch` follows the registry
and measures, one way at a time: two measurements beside each other would each see half of the bandwidth.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

from slipstream import registry_watch, telemetry
from slipstream.errors import SlipstreamError
from slipstream.record_limits import MAX_PATH_NAME_CHARS, MAX_PATH_TEXT_CHARS, MAX_PATHS_BYTES
from slipstream.registry_watch import RegistryView
from slipstream.v1.registry_pb2 import Role, TransferEndpoint, TransferPath, WorkerRecord, WorkerSet

log = telemetry.get_logger(__name__)

PAUSE_S = 0.2
"""Longest pause before a measurement. The pause and the order are random: or all workers would measure the same one."""
PROBE_S = 30.0
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 60.0

Admit = Callable[[Collection[bytes]], Awaitable[None]]
"""See `Engine.admit`."""
Probe = Callable[[str, TransferEndpoint, str], Awaitable[TransferPath]]
"""See `Engine.probe_path`."""


@dataclass(frozen=True, slots=True, order=True)
class Peer:
    """One incarnation of a peer's transfer agent; `epoch` is its endpoint's."""

    worker_id: str
    epoch: int


@dataclass(slots=True)
class _Entry:
    endpoint: TransferEndpoint
    due_s: float
    path: TransferPath | None = None
    failures: int = 0


@dataclass(slots=True)
class PeerBook:
    """The peers of one worker. `now_s` is in seconds of a clock that never goes backwards."""

    _entries: dict[Peer, _Entry] = field(default_factory=dict)

    def meet(self, records: Collection[WorkerRecord], role: Role.ValueType, model: str, now_s: float) -> bool:
        """Take the workers that there are now.

        Args:
            role, model: this worker's own; its peers have the other role and the same model. What was measured of a
                worker that has this role by now is kept: roles change, and change back.

        Returns:
            Whether a measured path was dropped, because its peer is gone or was restarted.
        """
        there = {
            Peer(record.worker_id, record.transfer.epoch): record.transfer
            for record in records
            if record.model == model
            and record.transfer.address
            and (record.role != role or Peer(record.worker_id, record.transfer.epoch) in self._entries)
        }
        gone = [self._entries.pop(peer) for peer in self._entries.keys() - there.keys()]
        for peer, endpoint in there.items():
            self._entries.setdefault(peer, _Entry(endpoint, due_s=now_s))
        return any(entry.path is not None for entry in gone)

    def due(self, now_s: float) -> list[tuple[Peer, TransferEndpoint]]:
        """Who is to be measured now."""
        return [(peer, entry.endpoint) for peer, entry in self._entries.items() if entry.due_s <= now_s]

    def next_due_s(self) -> float:
        """When somebody is due; infinite when nobody will be."""
        return min((entry.due_s for entry in self._entries.values()), default=float("inf"))

    def measured(self, peer: Peer, path: TransferPath | None, now_s: float) -> bool:
        """Take a measurement; None: there was none. A way that works is not measured again, others later and later.

        Returns:
            Whether `paths` has changed; it has not when the peer left meanwhile.
        """
        entry = self._entries.get(peer)
        if entry is None:
            return False
        if path is not None and not path.error:
            entry.due_s, entry.failures = float("inf"), 0
        else:
            # The exponent is bounded too: a peer may be out of reach for weeks, and floats end at 2**1024.
            entry.due_s = now_s + min(FIRST_RETRY_S * 2 ** min(entry.failures, 16), MAX_RETRY_S)
            entry.failures += 1
        if path is None:
            return False
        entry.path = path
        return True

    def failures(self, peer: Peer) -> int:
        """Measurements in a row that found no way from there."""
        entry = self._entries.get(peer)
        return entry.failures if entry is not None else 0

    def paths(self) -> tuple[TransferPath, ...]:
        """What was measured, by peer; with very many peers as much of it as a record takes, the bad news first."""
        known = [(peer, entry.path) for peer, entry in self._entries.items() if entry.path is not None]
        known.sort(key=lambda pair: (not pair[1].error, not pair[1].warning, pair[0]))
        room_bytes, kept = MAX_PATHS_BYTES, []
        for peer, path in known:
            room_bytes -= path.ByteSize()
            if room_bytes < 0:
                break
            kept.append((peer, path))
        return tuple(path for _, path in sorted(kept, key=lambda pair: pair[0]))


class PathWatch:
    """Keeps `paths` up to date, and who may exchange blocks with this worker, while `follow` runs.

    Whoever the registry has with the same model, in any role, may: roles change. While the control plane is gone that
    stays as it is.

    Args:
        role, model: this worker's own; they say who is a peer.
        admit: is told the public keys of those.
        probe: measures; one call at a time.
        measures: whether ways are measured (`transfer.probe`).
        on_change: called when `paths` has changed.
    """

    def __init__(
        self,
        registry_address: str,
        *,
        role: Role.ValueType,
        model: str,
        admit: Admit,
        probe: Probe,
        on_change: Callable[[], None],
        measures: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.paths: tuple[TransferPath, ...] = ()
        self._address = registry_address
        self._role = role
        self._model = model
        self._admit = admit
        self._admitted: frozenset[bytes] | None = None
        self._measures = measures
        self._probe = probe
        self._on_change = on_change
        self._clock = clock
        self._view = RegistryView()
        self._book = PeerBook()
        self._news = asyncio.Event()

    def take_role(self, role: Role.ValueType) -> None:
        """This worker's role is another one now, and so are its peers."""
        self._role = role
        self._meet()

    async def follow(self) -> None:
        """Measure each peer that comes. Runs until cancelled; the last paths stay."""
        async with asyncio.TaskGroup() as group:
            group.create_task(
                registry_watch.follow(self._address, take=self._take, lost=_registry_lost, identities=True)
            )
            if self._measures:
                group.create_task(self._measure_all())

    async def _take(self, workers: WorkerSet) -> None:
        self._view.apply(workers)
        await self._tell_registered()
        self._meet()

    async def _tell_registered(self) -> None:
        keys = frozenset(
            record.transfer.public_key
            for record in self._view.records()
            if record.model == self._model and record.transfer.public_key
        )
        if keys == self._admitted:
            return
        try:
            await self._admit(keys)
            self._admitted = keys
        except SlipstreamError as error:  # tried again with the next set, at the latest within a lease period
            log.warning("registered_workers_not_told", reason=error.message)

    def _meet(self) -> None:
        if self._book.meet(self._view.records(), self._role, self._model, self._clock()):
            self._publish()
        self._news.set()

    async def _measure_all(self) -> None:
        while True:
            self._news.clear()
            due = self._book.due(self._clock())
            if not due:
                await self._until_due()
                continue
            await asyncio.sleep(random.uniform(0, PAUSE_S))
            peer, endpoint = random.choice(due)
            path = await self._measure(peer, endpoint)
            if self._book.measured(peer, path, self._clock()):
                self._publish()

    async def _until_due(self) -> None:
        wait_s = self._book.next_due_s() - self._clock()
        try:
            async with asyncio.timeout(None if wait_s == float("inf") else wait_s):
                await self._news.wait()
        except TimeoutError:
            return

    async def _measure(self, peer: Peer, endpoint: TransferEndpoint) -> TransferPath | None:
        """The way from a peer; None when it could not be measured, which says nothing of the way itself."""
        first = self._book.failures(peer) == 0
        try:
            async with asyncio.timeout(PROBE_S):
                path = await self._probe(peer.worker_id, endpoint, "")
        except (SlipstreamError, OSError) as error:  # a timeout is an OSError too
            if first:
                log.warning("path_not_measured", peer=peer.worker_id, reason=str(error) or f"none in {PROBE_S:g} s")
            return None
        _report(path, first=first)
        return fit_for_record(path)

    def _publish(self) -> None:
        self.paths = self._book.paths()
        self._on_change()


def fit_for_record(path: TransferPath) -> TransferPath:
    """The same with texts that the registry takes: other programs' words may be long, or of several lines."""
    fit = TransferPath()
    fit.CopyFrom(path)
    for field_name, limit_chars in (
        ("transport", MAX_PATH_NAME_CHARS),
        ("detail", MAX_PATH_NAME_CHARS),
        ("warning", MAX_PATH_TEXT_CHARS),
        ("error", MAX_PATH_TEXT_CHARS),
    ):
        text = "".join(letter if letter.isprintable() else " " for letter in getattr(path, field_name))
        cut = text if len(text) <= limit_chars else f"{text[: limit_chars - 3]}..."
        setattr(fit, field_name, cut)
    return fit


def _report(path: TransferPath, *, first: bool) -> None:
    """One line for each way that works, and for the first failure of one that does not."""
    way = f"{path.transport}/{path.detail}"
    if path.error:
        if first:
            log.warning("no_path", peer=path.peer_worker_id, error=path.error)
        return
    say = log.warning if path.warning else log.info
    event = "slow_path" if path.warning else "path_measured"
    facts = {"warning": path.warning} if path.warning else {}
    say(
        event,
        peer=path.peer_worker_id,
        way=way,
        mb_per_s=round(path.bytes_per_s / 1e6, 1),
        latency_ms=round(path.latency_s * 1e3, 3),
        **facts,
    )


def _registry_lost(reason: str) -> None:
    """The registration tells of outages: this worker's other tie to the same registry."""
    log.debug("registry_lost", reason=reason)
