"""What this frontend has seen of each worker's speed, as the control plane is told it: who falls behind its peers shows
only where all of them are seen."""

from __future__ import annotations

from frontend.router.fleet import Fleet
from frontend.router.speeds import Correction
from slipstream.v1.planner_pb2 import WorkerSpeed


class WorkerSpeeds:
    """Of one fleet; tells of a worker when it has shown something since it was told of last."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._told: dict[tuple[str, int], int] = {}

    def take(self) -> list[WorkerSpeed]:
        """What is new."""
        speeds, told = [], {}
        for pool in self._fleet.pools.values():
            for one in pool.members:
                key, samples = (one.worker_id, one.record.epoch), one.prefill.samples + one.step.samples
                told[key] = samples
                new = samples - self._told.get(key, 0)
                if new > 0 and (one.step.known or one.prefill.known):
                    speeds.append(
                        WorkerSpeed(
                            worker_id=one.worker_id,
                            epoch=one.record.epoch,
                            step_factor=_factor(one.step),
                            prompt_factor=_factor(one.prefill),
                            samples=new,
                        )
                    )
        self._told = told
        return speeds


def _factor(correction: Correction) -> float:
    return correction.factor if correction.known else 0.0
