"""What a planner would see of a simulated cluster: the same observation that the live one makes from reports."""

from __future__ import annotations

from frontend.admission.claim import Priority
from planner.observation import Observation, Traffic, WorkerSeen
from simulator.members import Member
from simulator.serving import SimulatedCluster
from simulator.underway import Underway


class Observer:
    """Counts what happens between two looks. One of a cluster's watchers.

    Args:
        start_unix_s: what the load's beginning is by people's clocks.
    """

    def __init__(self, cluster: SimulatedCluster, start_unix_s: float = 0.0) -> None:
        self._cluster = cluster
        self._start_unix_s = start_unix_s
        self._traffic: dict[tuple[str, str], Traffic] = {}
        self._last_s = 0.0

    def look(self) -> Observation:
        """All that happened since the last look, and what is there now."""
        now_s = self._cluster.loop.now_s
        interval_s, self._last_s = now_s - self._last_s, now_s
        traffic, self._traffic = self._traffic, {}
        self._add_queues(traffic)
        workers = tuple(_seen(one, interval_s) for one in self._cluster.members.present.values())
        return Observation(now_s, self._start_unix_s + now_s, interval_s, workers, traffic)

    # -- as a watcher -------------------------------------------------------------------------------------

    def arrived(self, under: Underway) -> None:
        traffic = self._of(under)
        traffic.arrivals += 1
        traffic.input_tokens += under.journey.arrival.input_tokens

    def refused(self, under: Underway) -> None:
        # It arrived, and then was not taken in.
        traffic = self._of(under)
        traffic.refused += 1
        traffic.arrivals -= 1
        traffic.input_tokens -= under.journey.arrival.input_tokens

    def computed(self, under: Underway) -> None:
        traffic, journey = self._of(under), under.journey
        spared = journey.cached_tokens + journey.fetched_tokens
        traffic.cached_tokens += spared
        traffic.computed_prompt_tokens += max(0, journey.arrival.input_tokens - spared)

    def first_token(self, under: Underway) -> None:
        self._of(under).ttft.add(under.journey.ttft_s)

    def ended(self, under: Underway) -> None:
        traffic, journey = self._of(under), under.journey
        if journey.error:
            traffic.failed += 1
            return
        traffic.finished += 1
        traffic.output_tokens += journey.arrival.output_tokens
        if journey.arrival.output_tokens > 1:
            traffic.itl.add(journey.tpot_s)

    def _of(self, under: Underway) -> Traffic:
        key = under.model, under.claim.priority.label
        one = self._traffic.get(key)
        if one is None:
            one = self._traffic[key] = Traffic()
        return one

    def _add_queues(self, traffic: dict[tuple[str, str], Traffic]) -> None:
        for frontend in self._cluster.frontends:
            if frontend.gate is None:
                continue
            for priority in Priority:
                queued, tokens, oldest_s = frontend.gate.queued(priority)
                if queued:
                    waits = Traffic(queued=queued, queued_tokens=tokens, oldest_wait_s=oldest_s)
                    traffic.setdefault((frontend.model, priority.label), Traffic()).merge(waits)


def _seen(one: Member, interval_s: float) -> WorkerSeen:
    load = one.worker.load()
    prompt_s, generate_s = one.busy_since_last_asked_s()
    share = 1.0 / interval_s if interval_s > 0 else 0.0
    return WorkerSeen(
        one.worker_id,
        one.pool.model,
        one.role,
        one.state,
        one.since_s,
        gpus=one.gpus,
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        context_tokens=load.context_tokens,
        blocks_used=load.blocks_used,
        blocks=one.profile.blocks,
        prefill_busy=min(1.0, prompt_s * share),
        decode_busy=min(1.0, generate_s * share),
    )
