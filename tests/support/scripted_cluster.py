"""A whole cluster without engines in one event loop: real control plane, scripted workers, real dispatcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from frontend.dispatch import ClusterDispatcher, open_dispatcher
from frontend.generation import TokenDelta, TokenRequest
from planner.server import open_control_plane
from slipstream.settings import ControlPlaneSettings, FrontendSettings, Settings
from slipstream.v1.registry_pb2 import Role
from slipstream.v1.sampling_pb2 import SamplingParams
from tests.support.scripted_worker import MODEL, Handoffs, ScriptedWorker, until

PROMPT = list(range(5, 45))


@dataclass(slots=True)
class ScriptedCluster:
    dispatcher: ClusterDispatcher
    registry_address: str
    prefills: list[ScriptedWorker]
    decodes: list[ScriptedWorker]

    async def answer(self, request: TokenRequest) -> list[TokenDelta]:
        async with asyncio.timeout(20):
            return [delta async for delta in self.dispatcher.generate(request)]

    @property
    def workers(self) -> list[ScriptedWorker]:
        return [*self.prefills, *self.decodes]

    async def until_idle(self) -> None:
        """Every call on every worker has ended."""
        await until(lambda: all(worker.seen.open_calls == 0 for worker in self.workers))


@asynccontextmanager
async def scripted_cluster(
    *, prefill: int = 1, decode: int = 1, lease_s: float = 2.0, **frontend: Any
) -> AsyncIterator[ScriptedCluster]:
    """Workers are named p0, p1... and d0, d1...; returns when all of them are in the dispatcher's view.

    No task is left behind when the context ends: that is checked here, for every test.
    """
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(open_control_plane(ControlPlaneSettings(port=0, lease_s=lease_s)))
        handoffs = Handoffs()
        workers = {
            role: [
                await stack.enter_async_context(
                    ScriptedWorker(plane.address, role, f"{letter}{index}", handoffs=handoffs)
                )
                for index in range(count)
            ]
            for role, letter, count in ((Role.ROLE_PREFILL, "p", prefill), (Role.ROLE_DECODE, "d", decode))
        }
        # What scripted workers take for nothing would be computed by decode alone, and nothing be handed over.
        frontend.setdefault("handoff", "always")
        settings = Settings(
            control_plane=ControlPlaneSettings(address=plane.address), frontend=FrontendSettings(**frontend)
        )
        dispatcher = await stack.enter_async_context(open_dispatcher(settings))
        cluster = ScriptedCluster(dispatcher, plane.address, workers[Role.ROLE_PREFILL], workers[Role.ROLE_DECODE])
        if decode:
            await until(lambda: _counts(dispatcher) == (prefill, decode))
        yield cluster
        await cluster.until_idle()
    await until(lambda: not asyncio.all_tasks() - before)


def _counts(dispatcher: ClusterDispatcher) -> tuple[int, int]:
    models = dispatcher.models()
    return (models[0].prefill_workers, models[0].decode_workers) if models else (0, 0)


def a_request(
    request_id: str = "r1", *, token_ids: list[int] | None = None, model: str = MODEL, **sampling: Any
) -> TokenRequest:
    """Forty prompt tokens, eight to generate, greedy, unless told otherwise."""
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling})
    return TokenRequest(request_id, model, PROMPT if token_ids is None else token_ids, params)


def tokens_of(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]
