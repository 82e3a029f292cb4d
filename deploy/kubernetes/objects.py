"""Pools and worker pods, read from the objects of the API server.

A pool is a Deployment (or a LeaderWorkerSet) with a label that the settings' selector finds, a label that says in which
role its pods begin, and an annotation that names their model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from deploy.kubernetes.api import DEPLOYMENTS, LEADER_WORKER_SETS, PODS, Kind, Object
from deploy.kubernetes.errors import ApiBrokenError
from slipstream import telemetry
from slipstream.v1.registry_pb2 import Role

log = telemetry.get_logger(__name__)

ROLE_LABEL = "slipstream.dev/role"
MODEL_ANNOTATION = "slipstream.dev/model"
MAX_REPLICAS_ANNOTATION = "slipstream.dev/max-replicas"
DRAINING_ANNOTATION = "slipstream.dev/draining-since"
DELETION_COST_ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
SICK_ANNOTATION = "slipstream.dev/sick"
SICK_TAINT = "slipstream.dev/sick"
HASH_LABEL = "pod-template-hash"
LWS_NAME_LABEL = "leaderworkerset.sigs.k8s.io/name"
LWS_GROUP_LABEL = "leaderworkerset.sigs.k8s.io/group-index"
LWS_WORKER_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"

_ROLES = {"prefill": Role.ROLE_PREFILL, "decode": Role.ROLE_DECODE}
_STUCK_REASONS = frozenset(
    (
        *("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CrashLoopBackOff"),
        *("CreateContainerConfigError", "CreateContainerError", "RunContainerError"),
    )
)
"""Of a container that waits: what does not mend itself within a planner's patience."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What runs workers.

    Attributes:
        role: in which its pods begin; what they are now the registry knows.
        replicas: pods, or groups, it shall have: seats, whatever roles they have by now.
        most: seats it may have; None where nobody says.
        selector: labels of its pods.
        failure: why it could not make a pod (a quota, an admission webhook), by its own word.
    """

    kind: Kind
    name: str
    role: Role.ValueType
    model: str
    replicas: int
    most: int | None
    selector: Mapping[str, str]
    failure: str = ""

    @property
    def ends_last(self) -> bool:
        """Its seats are numbered, and the last one goes first."""
        return self.kind == LEADER_WORKER_SETS


@dataclass(frozen=True, slots=True)
class Pod:
    """A worker's pod.

    Attributes:
        name: also the worker's id.
        assigned: to a node.
        ending: Kubernetes ends it already.
        over: its processes have ended for good.
        draining_since_unix_s: when a planner chose it to go; 0 where none did.
        stuck: why it does not start, empty where it does.
        stuck_since_unix_s: since when.
        fell_unix_s: when it stopped being ready although its container had started well; 0 while that is not so.
        group: of a LeaderWorkerSet.
        sick: it was reported to be.
    """

    name: str
    uid: str
    labels: Mapping[str, str]
    created_unix_s: float
    phase: str
    assigned: bool
    ready: bool
    ready_since_unix_s: float
    restarts: int
    ending: bool
    deletion_cost: int
    draining_since_unix_s: float
    stuck: str
    stuck_since_unix_s: float
    fell_unix_s: float
    group: int
    sick: bool = False

    @property
    def over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def active(self) -> bool:
        """What its pool counts as one of its replicas."""
        return not self.over and not self.ending

    @property
    def follows(self) -> bool:
        """It is of a group that another pod leads: a part of a worker, and none of its own."""
        return self.labels.get(LWS_WORKER_LABEL, "0") != "0"

    @property
    def template(self) -> str:
        """Of which version of the pool it is."""
        return self.labels.get(HASH_LABEL, "")


def pools_of(items: Iterable[Object], kind: Kind) -> list[Pool]:
    """Those that can be used; the others are named in the log."""
    found = []
    with _understood(kind):
        for item in items:
            pool = _pool(item, kind)
            if isinstance(pool, Pool):
                found.append(pool)
            else:
                log.warning("pool_unusable", kind=kind.plural, name=item["metadata"].get("name"), reason=pool)
    return found


def pods_of(items: Iterable[Object]) -> list[Pod]:
    with _understood(PODS):
        return [_pod(item) for item in items]


@contextmanager
def _understood(kind: Kind) -> Iterator[None]:
    """What is written otherwise than the API documents it is a failure of the server, and no end of the planner."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ApiBrokenError(f"kubernetes: an object among the {kind.plural} is not understood: {error!r}") from error


def _pool(item: Object, kind: Kind) -> Pool | str:
    metadata, spec, status = item["metadata"], item["spec"], item.get("status", {})
    role = _ROLES.get(metadata.get("labels", {}).get(ROLE_LABEL, ""))
    model = metadata.get("annotations", {}).get(MODEL_ANNOTATION, "")
    if role is None:
        return f"its label {ROLE_LABEL} must be prefill or decode"
    if not model:
        return f"it needs an annotation {MODEL_ANNOTATION} with the name of the model that it serves"
    if kind == DEPLOYMENTS:
        selector = spec.get("selector", {})
        if selector.get("matchExpressions") or not selector.get("matchLabels"):
            return "spec.selector: only matchLabels are understood, and at least one"
        labels = dict(selector["matchLabels"])
    else:
        labels = {LWS_NAME_LABEL: metadata["name"]}
    most = metadata.get("annotations", {}).get(MAX_REPLICAS_ANNOTATION)
    if most is not None and not most.isdecimal():
        return f"its annotation {MAX_REPLICAS_ANNOTATION} must be a number, not {most!r}"
    return Pool(
        kind=kind,
        name=metadata["name"],
        role=role,
        model=model,
        replicas=int(spec.get("replicas", 1)),
        most=int(most) if most is not None else None,
        selector=labels,
        failure=_condition(status, "ReplicaFailure", "True").get("message", ""),
    )


def _pod(item: Object) -> Pod:
    metadata, status = item["metadata"], item.get("status", {})
    annotations, labels = metadata.get("annotations", {}), metadata.get("labels", {})
    ready = _condition(status, "Ready", "True")
    created_s = _unix_s(metadata.get("creationTimestamp"))
    stuck, stuck_since_s = _stuck(status, created_s)
    return Pod(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        labels=labels,
        created_unix_s=created_s,
        phase=status.get("phase", "Pending"),
        assigned=bool(item.get("spec", {}).get("nodeName")),
        ready=bool(ready),
        ready_since_unix_s=_unix_s(ready.get("lastTransitionTime")),
        restarts=max((int(one.get("restartCount", 0)) for one in status.get("containerStatuses", ())), default=0),
        ending="deletionTimestamp" in metadata,
        deletion_cost=_number(annotations.get(DELETION_COST_ANNOTATION)),
        draining_since_unix_s=float(_number(annotations.get(DRAINING_ANNOTATION))),
        stuck=stuck,
        stuck_since_unix_s=stuck_since_s,
        fell_unix_s=_fell_s(status),
        group=_number(labels.get(LWS_GROUP_LABEL)),
        sick=SICK_ANNOTATION in annotations,
    )


def _fell_s(status: Object) -> float:
    """Of a pod whose node is lost all stays as it was, but that it is not ready any more."""
    if not any(one.get("started") for one in status.get("containerStatuses", ())):
        return 0.0
    return _unix_s(_condition(status, "Ready", "False").get("lastTransitionTime"))


def _stuck(status: Object, created_unix_s: float) -> tuple[str, float]:
    unscheduled = _condition(status, "PodScheduled", "False")
    if unscheduled.get("reason") == "Unschedulable":
        since_s = _unix_s(unscheduled.get("lastTransitionTime")) or created_unix_s
        return f"it finds no room: {unscheduled.get('message', 'Unschedulable')}", since_s
    containers: Sequence[Object] = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    for one in containers:
        waiting = one.get("state", {}).get("waiting", {})
        if waiting.get("reason") in _STUCK_REASONS:
            return f"container {one.get('name')}: {waiting['reason']}: {waiting.get('message', '')}", created_unix_s
    return "", 0.0


def _condition(status: Object, kind: str, value: str) -> Mapping[str, Any]:
    conditions = status.get("conditions") or ()
    return next((one for one in conditions if one.get("type") == kind and one.get("status") == value), {})


def _unix_s(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _number(text: str | None) -> int:
    try:
        return int(text or 0)
    except ValueError:
        return 0
