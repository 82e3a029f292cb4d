"""Tells global frontends how the cluster is that one frontend serves: see `frontend.cluster_state` for what is told."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from frontend.admission.claim import Priority
from frontend.admission.gate import AdmissionGate
from frontend.admission.tenants import Tenants
from frontend.cluster_state import ClusterState, ModelState
from frontend.dispatch import ClusterDispatcher
from frontend.generation import ServedModel
from frontend.prefix_names import encoded
from frontend.router import Ask, Router
from frontend.traffic_count import TRAFFIC, TrafficCount
from slipstream.errors import SlipstreamError

PROMPT_TOKENS = (1, 512, 2048, 8192, 32768)
"""Lengths of new prompts for which the wait is predicted; what lies between is a line."""

PEER_KEPT_S = 10.0
"""A global frontend that has not asked for so long does not count any more."""

MAX_PEERS = 256


class StateTeller:
    """Tells the state of the cluster behind one frontend."""

    def __init__(
        self,
        dispatcher: ClusterDispatcher,
        gate: AdmissionGate,
        tenants: Tenants,
        *,
        model_name: str,
        draining: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        traffic: TrafficCount = TRAFFIC,
    ) -> None:
        self._dispatcher, self._gate, self._tenants = dispatcher, gate, tenants
        self._model_name = model_name
        self._draining, self._clock, self._traffic = draining, clock, traffic
        self._router = Router("kv")
        self._peers: OrderedDict[str, float] = OrderedDict()

    async def tell(self, key: str, peer: str, prefixes_version: int) -> bytes:
        """`TellsState`.

        Raises:
            PeerKeyError: the key is not known.
        """
        began_s = time.perf_counter()
        self._tenants.check_peer(key)
        now_s = self._clock()
        residents = self._dispatcher.residents
        names = residents.names(now_s)
        told = None if residents.version == prefixes_version else encoded(names)
        state = ClusterState(
            self._dispatcher.routing.fleet.tie_break,
            self._dispatcher.ready,
            self._draining(),
            0.0,
            self._count_peers(peer, now_s),
            [self._model(one, now_s) for one in self._dispatcher.models() if one.name == self._model_name],
            residents.version,
            told,
        )
        return msgspec.json.encode(msgspec.structs.replace(state, took_s=time.perf_counter() - began_s))

    def _count_peers(self, peer: str, now_s: float) -> int:
        self._peers[peer] = now_s
        self._peers.move_to_end(peer)
        while len(self._peers) > MAX_PEERS or now_s - next(iter(self._peers.values())) > PEER_KEPT_S:
            self._peers.popitem(last=False)
        return len(self._peers)

    def _model(self, model: ServedModel, now_s: float) -> ModelState:
        scheduler, recent = self._gate.scheduler, self._traffic.recent
        recent.turn(now_s)
        limits, queues = scheduler.policy.limits, scheduler.queues
        queued = {one.label: len(queues.of(one)) for one in Priority}
        left = limits.total - len(queues)
        return ModelState(
            model.name,
            model.max_model_len,
            model.prefill_workers,
            model.decode_workers,
            model.created_unix_s,
            ready_s=self._ready_s(model, now_s),
            wait_s={one.label: scheduler.backlog_s(one, now_s) for one in Priority},
            queued=queued,
            room={one.label: max(0, min(left, limits.by_class[one] - queued[one.label])) for one in Priority},
            ttft_p50_s=recent.ttft.percentile_s(50),
            ttft_p95_s=recent.ttft.percentile_s(95),
            itl_p50_s=recent.itl.percentile_s(50),
            bytes_per_token=self._dispatcher.residents.bytes_per_token,
        )

    def _ready_s(self, model: ServedModel, now_s: float) -> list[tuple[int, float]]:
        found: list[tuple[int, float]] = []
        for tokens in PROMPT_TOKENS:
            if tokens >= model.max_model_len and found:
                break
            try:
                route = self._router.choose(Ask(model.name, tokens), self._dispatcher.routing.fleet, now_s)
            except SlipstreamError:
                return []
            if route.predicted is not None:
                found.append((tokens, max(0.0, route.predicted.ttft_s)))
        return found
