"""A small profile whose predictions can be told in the head."""

from __future__ import annotations

from typing import Any

import msgspec

from slipstream.performance import DecodePoint, PrefillPoint, Profile

PROFILE = Profile(
    name="small",
    model="m",
    device="d",
    source="a test",
    measured_on="2026-01-01",
    prefill=(PrefillPoint(10, 0.02), PrefillPoint(100, 0.11)),  # 0.01 s a step, 0.001 s a token
    decode=tuple(DecodePoint(batch, context, 0.005) for batch in (1, 8) for context in (1, 100)),
    block_tokens=4,
    block_bytes=1000,
    blocks=16,
    step_tokens=16,
    max_running=4,
    max_model_len=60,
    transfer_bytes_per_s=1e6,
    transfer_latency_s=0.001,
    prefill_step_tokens=100,
)


def profile(**changes: Any) -> Profile:
    return msgspec.structs.replace(PROFILE, **changes)
