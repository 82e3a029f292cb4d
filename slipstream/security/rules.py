"""Which roles may make which call. What is not listed nobody may."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream.security.names import ComponentRole

_ALL = frozenset(ComponentRole) - {ComponentRole.METRICS}
_OPERATOR = frozenset({ComponentRole.OPERATOR})
_PLANS = frozenset({ComponentRole.CONTROL_PLANE, ComponentRole.OPERATOR})
_GENERATES = frozenset({ComponentRole.FRONTEND})

MAY_CALL: Mapping[str, frozenset[ComponentRole]] = {
    "/slipstream.v1.Registry/Register": frozenset({ComponentRole.WORKER}),
    "/slipstream.v1.Registry/Deregister": frozenset({ComponentRole.WORKER}),
    "/slipstream.v1.Registry/Watch": _ALL,
    "/slipstream.v1.Planner/ReportTraffic": _GENERATES,
    "/slipstream.v1.Planner/WatchTraffic": _PLANS,
    "/slipstream.v1.Planner/GetPlan": _PLANS,
    "/slipstream.v1.Planner/Explain": _PLANS,
    "/slipstream.v1.Planner/History": _PLANS,
    "/slipstream.v1.Planner/Apply": _OPERATOR,
    "/slipstream.v1.Planner/Simulate": _OPERATOR,
    "/slipstream.v1.Planner/Recommend": _OPERATOR,
    "/slipstream.v1.Scaler/ListWorkers": _PLANS,
    "/slipstream.v1.Scaler/StartWorker": _PLANS,
    "/slipstream.v1.Scaler/DrainWorker": _PLANS,
    "/slipstream.v1.Scaler/HoldLease": _PLANS,
    "/slipstream.v1.Scaler/ReleaseLease": _PLANS,
    "/slipstream.v1.Scaler/ReportSick": _PLANS,
    "/slipstream.v1.PrefillWorker/PrefillMany": _GENERATES,
    "/slipstream.v1.DecodeWorker/DecodeMany": _GENERATES,
    "/slipstream.v1.Worker/GetStatus": _ALL,
    "/slipstream.v1.Worker/ProbePath": _OPERATOR,
    "/slipstream.v1.Worker/WatchCache": _GENERATES | _PLANS,
    "/slipstream.v1.Worker/SetRole": _PLANS | {ComponentRole.LAUNCHER},
    "/slipstream.v1.Worker/SetFence": _PLANS,
    "/slipstream.v1.NodeGroup/Join": frozenset({ComponentRole.WORKER}),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ALL,
}

OPEN_PREFIX = "/grpc.health.v1.Health/"
"""Asked by who starts and watches processes, and tells nothing but whether they serve: needs no token and no role."""


def may_call(role: ComponentRole, method: str) -> bool:
    return role in MAY_CALL.get(method, ())
