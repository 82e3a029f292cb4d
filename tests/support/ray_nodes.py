"""The process that owns the nodes of a test's Ray cluster; see `tests.support.ray_cluster`.

Ray reads the environment once, when it is imported, and keeps handlers, threads and children of its own: none of that
is for the process that runs tests. A line on standard input is a command, a JSON line on standard output its answer;
the end of the input is the end of the cluster.

    python -m tests.support.ray_nodes HEAD_CPUS
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes. Nothing of Slipstream's is ever in it."""


def main(head_cpus: int) -> None:
    head = {"num_cpus": head_cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    _tell({"address": cluster.address})
    for line in sys.stdin:
        command, *words = line.split()
        if command == "add":
            node = cluster.add_node(num_cpus=int(words[0]), object_store_memory=OBJECT_STORE_BYTES)
            pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
            _tell({"node": node.node_id, "pids": pids})
        elif command == "drain":
            _tell({"refused": _drain(cluster.address, words[0], float(words[1]))})
    cluster.shutdown()  # type: ignore[no-untyped-call]


def _drain(address: str, node_id: str, deadline_s: float) -> str:
    raylet: Any = ray._raylet
    reasons: Any = autoscaler_pb2
    accepted, why = raylet.GcsClient(address=address).drain_node(
        node_id,
        reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test",
        int((time.time() + deadline_s) * 1000),
    )
    return "" if accepted else f"refused: {why}"


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
