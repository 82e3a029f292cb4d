"""Decode workers that take no time: what a frontend is measured with, so that nothing but the frontend is.

    python -m benchmarks.instant_worker REGISTRY MODEL WORKERS STEP_S [FIRST_TOKEN [SECURITY]]

They speak gRPC as real workers do, through the real `decode_worker.service`; behind it, steps make one token of each
running sequence, as fast as possible or every STEP_S seconds. As in vLLM, tokens that a sequence's reader has not
fetched when the next ones come are handed over together. SECURITY is JSON of `slipstream.security_settings`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import uvloop

from decode_worker.service import DecodeService
from engine.admission import Admission
from engine.protocol import TokensGenerated
from slipstream import grpc_wakeups
from slipstream.background import background
from slipstream.grpc_channels import server_options
from slipstream.registration import Registration
from slipstream.security import identity
from slipstream.security.names import ComponentRole
from slipstream.security.servers import create_server, listen
from slipstream.security_settings import SecuritySettings
from slipstream.v1 import worker_pb2_grpc
from slipstream.v1.registry_pb2 import Capacity, Load, Role, WorkerRecord, WorkerState
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount, SamplingParams
from slipstream.v1.worker_pb2 import Handoff

_MAX_MODEL_LEN = 1 << 20
_BLOCK_TOKENS = 16
_MAX_OPEN = 8192
# Tokens go round in a range of so many ids, from one on where the vocabularies of most models have plain text.
FIRST_TOKEN, _TOKENS = 1000, 90


@dataclass(slots=True, eq=False)
class _Sequence:
    """One request: how many tokens it is still to get, and those that wait for its reader."""

    left: int
    position: int
    first_token: int
    waiting: list[int] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)

    def step(self) -> None:
        self.waiting.append(self.first_token + self.position * 7 % _TOKENS)
        self.position += 1
        self.left -= 1
        self.came.set()


class InstantEngine:
    """The decoding half of `engine.protocol.Engine`.

    Args:
        step_s: between two steps; 0 is as fast as possible.
    """

    def __init__(self, worker_id: str, step_s: float, first_token: int = FIRST_TOKEN) -> None:
        self._worker_id = worker_id
        self._step_s = step_s
        self._first_token = first_token
        self._running: set[_Sequence] = set()
        self._work = asyncio.Event()

    async def decode(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        handoff: Handoff | None,
        *,
        cache_salt: str = "",
    ) -> AsyncGenerator[TokensGenerated, None]:
        sequence = _Sequence(max(1, sampling.max_tokens), len(token_ids), self._first_token)
        sequence.step()  # the prompt takes no time
        if sequence.left:
            self._running.add(sequence)
            self._work.set()
        try:
            while True:
                await sequence.came.wait()
                sequence.came.clear()
                tokens, sequence.waiting = sequence.waiting, []
                if sequence.left == 0:
                    account = RequestAccount(prompt_tokens=len(token_ids), decode_worker=self._worker_id)
                    yield TokensGenerated(tokens, finish_reason=FinishReason.FINISH_REASON_LENGTH, account=account)
                    return
                yield TokensGenerated(tokens)
        finally:
            self._running.discard(sequence)

    def load(self) -> Load:
        return Load(running=len(self._running))

    async def run(self) -> None:
        """The steps, for ever."""
        while True:
            await self._work.wait()
            for sequence in tuple(self._running):
                sequence.step()
                if sequence.left == 0:
                    self._running.discard(sequence)
            if not self._running:
                self._work.clear()
            await asyncio.sleep(self._step_s)


@asynccontextmanager
async def worker(
    registry: str, model: str, worker_id: str, step_s: float, first_token: int = FIRST_TOKEN
) -> AsyncIterator[None]:
    """One decode worker, registered, while the block runs."""
    engine = InstantEngine(worker_id, step_s, first_token)
    server = create_server(server_options())
    service = DecodeService(engine, Admission(limit=_MAX_OPEN), model=model)  # type: ignore[arg-type]
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(service, server)
    port = listen(server, "127.0.0.1:0", what="an instant worker")
    record = WorkerRecord(
        worker_id=worker_id,
        role=Role.ROLE_DECODE,
        state=WorkerState.READY,
        model=model,
        address=f"127.0.0.1:{port}",
        epoch=1,
        device="cpu",
        capacity=Capacity(
            max_model_len=_MAX_MODEL_LEN,
            block_tokens=_BLOCK_TOKENS,
            blocks=1 << 20,
            block_bytes=1,
            max_running=_MAX_OPEN,
        ),
    )

    def now() -> WorkerRecord:
        record.load.CopyFrom(engine.load())
        return record

    await server.start()
    try:
        async with background(engine.run(), name="steps"), Registration(registry, now):
            yield
    finally:
        await server.stop(0)


async def _serve(registry: str, model: str, workers: int, step_s: float, first_token: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        for index in range(workers):
            await stack.enter_async_context(worker(registry, model, f"decode-{index}", step_s, first_token))
        await stop.wait()


if __name__ == "__main__":
    grpc_wakeups.install()
    first = int(sys.argv[5]) if len(sys.argv) > 5 else FIRST_TOKEN
    if len(sys.argv) > 6:
        identity.install(SecuritySettings.model_validate_json(sys.argv[6]), ComponentRole.WORKER)
    uvloop.run(_serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), first))
