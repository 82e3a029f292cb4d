"""Fleets of workers as the router's tests want them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from frontend.router import Ask, Fleet, Route, Router
from slipstream.performance import DecodePoint, PrefillPoint, Profile
from slipstream.v1.registry_pb2 import Capacity, Load, Role, TransferEndpoint, WorkerRecord, WorkerState

PREFILL, DECODE = Role.ROLE_PREFILL, Role.ROLE_DECODE
ASK = Ask("m", prompt_tokens=100, max_tokens=50)

PROFILE = Profile(
    name="test",
    model="m",
    device="test",
    source="made up: 1 ms and 0.1 ms a token; 10 ms and 0.5 ms a sequence a step",
    measured_on="2026-01-01",
    prefill=(PrefillPoint(100, 0.011), PrefillPoint(1000, 0.101), PrefillPoint(100_000, 10.001)),
    decode=tuple(
        DecodePoint(batch, context, 0.010 + batch * (0.0005 + context * 1e-8))
        for batch in (1, 64)
        for context in (1, 10_000)
    ),
    block_tokens=16,
    block_bytes=16_000,
    blocks=20_000,
    step_tokens=2048,
    max_running=64,
    max_model_len=100_000,
    transfer_bytes_per_s=1e9,
    transfer_latency_s=1e-3,
    prefill_step_tokens=100_000,
)


@dataclass(frozen=True, slots=True)
class Worker:
    """A record and what the worker has before it.

    Attributes:
        requests: that it was sent by this frontend.
        waiting: prompt tokens that it was sent, in one request more, and has not computed.
    """

    record: WorkerRecord
    suspect: bool = False
    requests: int = 0
    waiting: int = 0
    profile: Profile | None = None


def worker(
    worker_id: str,
    role: Role.ValueType,
    *,
    requests: int = 0,
    waiting: int = 0,
    used: int = 0,
    suspect: bool = False,
    profile: Profile | None = None,
    **fields: Any,
) -> Worker:
    record = WorkerRecord(
        worker_id=worker_id,
        role=role,
        state=fields.get("state", WorkerState.READY),
        model=fields.get("model", "m"),
        host_id=fields.get("host_id", "h"),
        epoch=fields.get("epoch", 1),
        capacity=Capacity(
            max_model_len=fields.get("max_model_len", 1000),
            block_tokens=16,
            blocks=fields.get("blocks", 100),
            block_bytes=fields.get("block_bytes", 0),
            max_running=fields.get("max_running", 64),
        ),
        load=Load(blocks_used=used),
        transfer=fields.get("transfer", TransferEndpoint(address="h:1", epoch=7, transports=["shm"])),
        paths=fields.get("paths", ()),
    )
    return Worker(record, suspect, requests, waiting, profile)


def fast_worker(worker_id: str, role: Role.ValueType, **fields: Any) -> Worker:
    """One with a profile, a long context and room."""
    fields = {"max_model_len": 100_000, "blocks": 20_000, "block_bytes": 16_000, "profile": PROFILE, **fields}
    return worker(worker_id, role, **fields)


def fleet_of(workers: Iterable[Worker], *, tie_break: str = "") -> Fleet:
    fleet = Fleet(tie_break=tie_break)
    for one in workers:
        fleet.put(one.record)
        fleet.note_profile(one.record.worker_id, one.profile)
        for _ in range(one.requests):
            fleet.begin(one.record.worker_id, 1, 0, now_s=0.0)
        if one.waiting:
            fleet.begin(one.record.worker_id, one.waiting, one.waiting, now_s=0.0)
    return fleet


def choose(ask: Ask, workers: list[Worker], *, tie_break: str = "", router: Router | None = None) -> Route:
    """The route, with a handoff wherever there can be one, unless another router is given."""
    suspects = frozenset(one.record.worker_id for one in workers if one.suspect)
    asked = Ask(
        ask.model, ask.prompt_tokens, ask.max_tokens, ask.excluded, ask.known, suspects=suspects, session=ask.session
    )
    router = Router(always_hand_off=True) if router is None else router
    return router.choose(asked, fleet_of(workers, tie_break=tie_break), 0.0)
