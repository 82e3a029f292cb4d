"""What acts on the objects of the API server of the tests: Deployments make and end pods, a scheduler places them.

Written from Kubernetes' documentation of the ReplicaSet controller, and from nothing in `deploy.kubernetes`: which pods
go first when there are too many, and that a pod which ends by itself, or is deleted, is replaced.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from tests.support.kubernetes_objects import Object, Store, is_ready, now, set_condition

Kubelet = Callable[[Object], None]
_PHASES = {"Pending": 0, "Unknown": 1, "Running": 2}


@dataclass(slots=True)
class Controllers:
    """A Deployment controller (one ReplicaSet each), a LeaderWorkerSet controller, a scheduler.

    Attributes:
        room: pods that fit onto the nodes.
        quota: pods that may be made at all.
        started: called with a pod that got a node.
        deleted: called with a pod that shall end; it is to call `gone` at last.
    """

    store: Store
    room: int = 100
    quota: int = 100
    started: Kubelet = lambda pod: None
    deleted: Kubelet | None = None
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def act(self) -> None:
        """Once, on all that there is."""
        for deployment in self.store.all("deployments"):
            self._replicate(deployment)
        for group in self.store.all("leaderworkersets"):
            self._number(group)
        self._schedule()

    def delete(self, pod: Object) -> None:
        """As `kubectl delete pod` does: it is told to end, and goes when it has."""
        if "deletionTimestamp" in pod["metadata"]:
            return
        pod["metadata"]["deletionTimestamp"] = now()
        self.store.touch(pod)
        if self.deleted is None or not pod["spec"].get("nodeName"):
            self.gone(pod)
        else:
            self.deleted(pod)

    def gone(self, pod: Object) -> None:
        self.store.objects["pods"].pop(pod["metadata"]["name"], None)

    def set_ready(self, pod: Object, ready: bool = True) -> None:
        """As a kubelet does after its probes."""
        if ready:
            pod["status"]["phase"] = "Running"
        if is_ready(pod) != ready:
            set_condition(pod, "Ready", ready)
            self.store.touch(pod)

    def fail(self, pod: Object) -> None:
        """It was evicted: its processes have ended, the object stays."""
        pod["status"]["phase"] = "Failed"
        set_condition(pod, "Ready", False)
        self.store.touch(pod)

    def _replicate(self, deployment: Object) -> None:
        wanted = deployment["spec"]["replicas"]
        pods = self._pods(deployment["spec"]["selector"]["matchLabels"])
        short = wanted - len(pods)
        for _ in range(min(short, self.quota - len(self.store.all("pods")))):
            self._make(deployment)
        if short > 0 and len(self._pods(deployment["spec"]["selector"]["matchLabels"])) < wanted:
            set_condition(deployment, "ReplicaFailure", True, message="pods is forbidden: exceeded quota: gpus")
        for pod in sorted(pods, key=_goes)[: max(0, -short)]:
            self.delete(pod)
        self._note(deployment, len(self._pods(deployment["spec"]["selector"]["matchLabels"])))

    def _number(self, group: Object) -> None:
        """A LeaderWorkerSet: groups are numbered, the highest goes first."""
        name = group["metadata"]["name"]
        pods = {
            int(one["metadata"]["labels"]["leaderworkerset.sigs.k8s.io/group-index"]): one
            for one in self._pods({"leaderworkerset.sigs.k8s.io/name": name})
            if one["metadata"]["labels"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
        }
        wanted = group["spec"]["replicas"]
        for number in range(wanted):
            if number not in pods and f"{name}-{number}" not in self.store.objects.get("pods", {}):
                for worker in range(group["spec"]["leaderWorkerTemplate"]["size"]):
                    self._make_numbered(group, number, worker)
        for number, pod in pods.items():
            if number >= wanted:
                self.delete(pod)
        self._note(group, wanted)

    def _note(self, owner: Object, replicas: int) -> None:
        status = owner.setdefault("status", {})
        if status.get("replicas") != replicas:  # as in Kubernetes, that too makes another version of the object
            status["replicas"] = replicas
            self.store.touch(owner)

    def _pods(self, labels: dict[str, str]) -> list[Object]:
        """That count as replicas: neither over nor ending."""
        return [
            one
            for one in self.store.all("pods")
            if labels.items() <= one["metadata"]["labels"].items()
            and "deletionTimestamp" not in one["metadata"]
            and one["status"]["phase"] not in ("Succeeded", "Failed")
        ]

    def _make(self, deployment: Object) -> None:
        name = f"{deployment['metadata']['name']}-5d4f8c7b9-{next(self._numbers):05d}"
        self._create(name, {**deployment["spec"]["template"]["metadata"]["labels"], "pod-template-hash": "5d4f8c7b9"})

    def _make_numbered(self, group: Object, number: int, worker: int) -> None:
        name = f"{group['metadata']['name']}-{number}" + (f"-{worker}" if worker else "")
        templates = group["spec"]["leaderWorkerTemplate"]
        template = templates.get("workerTemplate") if worker else None
        labels = {
            **(template or templates["leaderTemplate"])["metadata"]["labels"],
            "leaderworkerset.sigs.k8s.io/name": group["metadata"]["name"],
            "leaderworkerset.sigs.k8s.io/group-index": str(number),
            "leaderworkerset.sigs.k8s.io/worker-index": str(worker),
        }
        self._create(name, labels)

    def _create(self, name: str, labels: dict[str, str]) -> None:
        metadata = {"name": name, "labels": labels}
        self.store.create("pods", {"metadata": metadata, "spec": {}, "status": {"phase": "Pending"}})

    def _schedule(self) -> None:
        placed = sum(bool(one["spec"].get("nodeName")) for one in self.store.all("pods"))
        for pod in self.store.all("pods"):
            if pod["spec"].get("nodeName") or "deletionTimestamp" in pod["metadata"]:
                continue
            if placed < self.room:
                placed += 1
                pod["spec"]["nodeName"] = f"node-{placed}"
                set_condition(pod, "PodScheduled", True)
                self.store.touch(pod)
                self.started(pod)
            elif not pod["status"].get("conditions"):
                message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
                set_condition(pod, "PodScheduled", False, reason="Unschedulable", message=message)
                self.store.touch(pod)


def _goes(pod: Object) -> tuple[bool, int, bool, int, float, int, float]:
    """Sorts pods by who goes first."""
    metadata, status = pod["metadata"], pod["status"]
    cost = int(metadata.get("annotations", {}).get("controller.kubernetes.io/pod-deletion-cost", "0"))
    ready: Object = next((one for one in status.get("conditions", ()) if one["type"] == "Ready"), {})
    since_s = _time(ready.get("lastTransitionTime", metadata["creationTimestamp"]))
    created_s = _time(metadata["creationTimestamp"])
    restarts = max((one.get("restartCount", 0) for one in status.get("containerStatuses", ())), default=0)
    assigned = bool(pod["spec"].get("nodeName"))
    return (assigned, _PHASES[status["phase"]], is_ready(pod), cost, -since_s, -restarts, -created_s)


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
