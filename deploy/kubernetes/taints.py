"""Nothing new onto a node whose device is sick: a taint, until whoever mends the node takes it away."""

from __future__ import annotations

from deploy.kubernetes.api import NODES, KubernetesApi
from deploy.kubernetes.errors import ConflictError, ObjectMissingError
from deploy.kubernetes.objects import SICK_TAINT
from slipstream import telemetry

log = telemetry.get_logger(__name__)


async def keep_off(api: KubernetesApi, node: str) -> None:
    """Have nothing scheduled there that does not tolerate it. Done already, or the node is gone: nothing.

    Raises:
        KubernetesError
    """
    while True:
        try:
            found = await api.call("get", NODES, node)
            taints = found.get("spec", {}).get("taints") or []
            if any(one.get("key") == SICK_TAINT for one in taints):
                return
            # The list is replaced as a whole: only as it was read.
            body = {
                "metadata": {"resourceVersion": found["metadata"]["resourceVersion"]},
                "spec": {"taints": [*taints, {"key": SICK_TAINT, "value": "device", "effect": "NoSchedule"}]},
            }
            await api.call("patch", NODES, node, body=body)
        except ConflictError:  # kubelets write to their nodes every few seconds
            continue
        except ObjectMissingError:
            return
        log.warning("node_tainted", node=node, taint=SICK_TAINT)
        return
