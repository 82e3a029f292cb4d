"""Which part of a worker this process is, where the worker's tensor-parallel ranks are on several nodes.

The node with rank 0 leads: it has the scheduler, registers and serves. All others follow: they have ranks, and nothing
else. Each node has the same number of ranks.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil

from slipstream.addresses import host_port
from slipstream.errors import ConfigError
from slipstream.security.servers import is_loopback
from slipstream.worker_settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """The nodes of a worker; most have one.

    Attributes:
        rank: of this node.
        local_ranks: of the engine, on this node.
        leader: host name or IP of the first node; empty for a single one.
        port: at which its engine's ranks find each other.
    """

    nodes: int
    rank: int
    local_ranks: int
    leader: str
    port: int

    @classmethod
    def of(cls, worker: WorkerSettings) -> NodeGroup:
        """As these settings say.

        Raises:
            ConfigError: they do not fit each other.
        """
        nodes, rank, ranks = worker.nnodes, worker.node_rank, worker.tensor_parallel_size
        if rank >= nodes:
            raise ConfigError(
                f"worker.node_rank = {rank}: it counts from 0, and worker.nnodes is {nodes}: at most {nodes - 1}",
                param="worker.node_rank",
            )
        if nodes == 1:
            return cls(1, 0, ranks, "", worker.master_port)
        if worker.engine != "vllm":
            raise ConfigError(
                f"worker.nnodes = {nodes}: worker.engine = {worker.engine} is on one node; only vllm is on several",
                param="worker.nnodes",
            )
        if ranks % nodes:
            raise ConfigError(
                f"worker.nnodes = {nodes} does not divide worker.tensor_parallel_size = {ranks}: each node has an even "
                "part of the GPUs",
                param="worker.nnodes",
            )
        if not worker.master_addr:
            raise ConfigError(
                f"worker.master_addr is needed with worker.nnodes = {nodes}: host name or IP of the node with "
                "worker.node_rank 0",
                param="worker.master_addr",
            )
        if is_loopback(host_port(worker.host, 0)) and not is_loopback(host_port(worker.master_addr, 0)):
            raise ConfigError(
                f"worker.host = {worker.host}: the others of worker.nnodes = {nodes} cannot reach this one there; "
                "give the address at which they do",
                param="worker.host",
            )
        return cls(nodes, rank, ranks // nodes, worker.master_addr, worker.master_port)

    @property
    def several(self) -> bool:
        return self.nodes > 1

    @property
    def follows(self) -> bool:
        return self.rank > 0

    @property
    def followers(self) -> range:
        return range(1, self.nodes)

    @property
    def tie_port(self) -> int:
        return self.port + 1

    @property
    def tie_address(self) -> str:
        """Where followers find the first node's service."""
        return host_port(self.leader, self.tie_port)


def network_variables(host: str) -> dict[str, str]:
    """What tells torch and vLLM at which address, and by which device, the other nodes reach this one.

    Both guess otherwise, and where a host's name means 127.0.0.1 to itself, as it often does, they guess that.
    """
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return {}
    for device, ends in psutil.net_if_addrs().items():
        if any(end.address.partition("%")[0] == address for end in ends):
            return {"VLLM_HOST_IP": address, "GLOO_SOCKET_IFNAME": device}
    return {}  # every address, or one that is not this machine's
