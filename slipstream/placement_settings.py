"""Settings of who starts workers, where and how many: `slipstream up`, Ray, the planner, Kubernetes.

Part of `slipstream.settings`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slipstream.settings_section import Section


class ClusterSettings(Section):
    """What `slipstream up` starts."""

    on: Literal["local", "ray"] = Field(
        "local", description="where the workers run: processes on this machine, or actors on the nodes of a Ray cluster"
    )
    name: str = Field(
        "slipstream",
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="under which its workers are found again on Ray; one for each cluster",
    )
    prefill: int = Field(1, ge=0, le=64, description="prefill workers")
    decode: int = Field(1, ge=1, le=64, description="decode workers")
    log_dir: Path | None = Field(
        None, description="folder of the processes' logs; under the user's state folder when absent"
    )
    ready_timeout_s: float = Field(300.0, gt=0, le=7200, description="longest `up` waits for everything to be ready")
    autoscale: bool = Field(False, description="let the planner start, flip and drain workers")
    max_workers: int | None = Field(
        None,
        ge=1,
        le=256,
        description="most workers with `autoscale`; one for each CPU when absent. On Ray it has to be given",
    )


class RaySettings(Section):
    """Workers on the nodes of a Ray cluster (cluster.on = ray): each an actor in a placement group of its own."""

    address: str | None = Field(
        None,
        description="host:port of the Ray cluster, of which this machine is a node; the one that runs here when "
        "absent, and where none does one is started for as long as `up` runs",
    )
    cpus_per_worker: float = Field(1.0, ge=0.01, le=1024, description="CPUs that Ray keeps for a worker")
    gpus_per_worker: int = Field(
        0,
        ge=0,
        le=64,
        description="GPUs that Ray keeps for a worker, all on one node: as many as `worker.tensor_parallel_size`; 0 "
        "for engines on CPUs",
    )
    place_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="longest a worker may wait for a node with room; minutes where Ray itself adds nodes",
    )
    orphan_after_s: float = Field(
        120.0, ge=2, le=86400, description="a worker that hears nothing from `up` for this long drains and ends"
    )


class PlannerSettings(Section):
    """The planner of worker counts, in the control plane's process."""

    policy: Path | None = Field(
        None, description="file of the scaling policy (see docs/autoscaling.md); nothing is planned when absent"
    )
    dry_run: bool = Field(False, description="decide, tell what would be done, and do nothing")
    scaler: str = Field(
        "",
        description="what starts and ends workers: `kubernetes`, or the address of a scaler's gRPC service; unix:PATH "
        "works too",
    )
    follow: str | None = Field(
        None,
        description="host:port of the control plane that workers and frontends know, where that is another process: "
        "this planner stands by for it",
    )


class KubernetesSettings(Section):
    """Where workers are pods (planner.scaler = kubernetes)."""

    namespace: str | None = Field(
        None,
        pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
        description="namespace of the pools; the planner's own, or the kubeconfig's, when absent",
    )
    selector: str = Field(
        "slipstream.dev/pool",
        min_length=1,
        description="label selector of the pools (Deployments, LeaderWorkerSets) and of their pods",
    )
    lease: str = Field(
        "slipstream-planner",
        pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
        description="name of the Lease that the planner which acts holds",
    )
    leader_worker_sets: bool = Field(False, description="look for pools among LeaderWorkerSets too")
    kubeconfig: Path | None = Field(
        None, description="kubeconfig file; in a pod its service account when absent, elsewhere KUBECONFIG's"
    )
    context: str | None = Field(None, description="context of the kubeconfig; its current one when absent")
    taint_nodes: bool = Field(
        False,
        description="keep new pods off a node with a sick GPU (taint slipstream.dev/sick); needs a rule for nodes",
    )
    timeout_s: float = Field(10.0, gt=0, le=300, description="longest one action may take, with every retry")
    pending_s: float = Field(
        300.0,
        ge=0,
        le=86400,
        description="a pod that has found no room, or could not start, for so long is not counted on any more",
    )
