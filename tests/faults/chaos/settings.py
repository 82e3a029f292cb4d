"""The settings of the cluster that is broken: small caches, short leases and deadlines, so that minutes are enough."""

from __future__ import annotations

import hashlib
from pathlib import Path

from slipstream.settings import (
    AdmissionSettings,
    ControlPlaneSettings,
    FrontendSettings,
    LogSettings,
    Settings,
    TenantSettings,
)
from slipstream.worker_settings import SimulatedSettings, TransferSettings, WorkerSettings
from tests.faults.chaos.answers import SIMULATED_SEED
from tests.faults.chaos.plan import TENANTS, Shape

REQUEST_TIMEOUT_S = 60.0
DRAIN_S = 20.0
LEASE_S = 3.0
MODEL_NAME = "tiny"
_SIMULATED_BLOCK_BYTES = 4_194_304  # of the profile


def key_of(tenant: int) -> str:
    """A tenant's API key."""
    return f"chaos-key-{tenant}"


def base(model: Path, shape: Shape, plane_port: int) -> Settings:
    """What all processes share."""
    tenants = tuple(
        TenantSettings(
            name=f"tenant-{tenant}",
            key_sha256=hashlib.sha256(key_of(tenant).encode()).hexdigest(),
            weight=float(tenant + 1),
        )
        for tenant in range(TENANTS)
    )
    return Settings(
        model=str(model),
        served_model_name=MODEL_NAME,
        device="cpu" if shape.engine == "vllm" else "auto",
        dtype="float32" if shape.engine == "vllm" else "auto",
        control_plane=ControlPlaneSettings(port=plane_port, address=f"127.0.0.1:{plane_port}", lease_s=3.0),
        frontend=FrontendSettings(
            handoff="always",
            request_timeout_s=REQUEST_TIMEOUT_S,
            prefill_timeout_s=15.0,
            prefill_silence_s=3.0,
            first_token_timeout_s=20.0,
            token_timeout_s=15.0,
            drain_timeout_s=DRAIN_S,
        ),
        admission=AdmissionSettings(realtime_queue=48, nearline_queue=48, batch_queue=48, queue=96, tenants=tenants),
        simulated=SimulatedSettings(seed=SIMULATED_SEED, speed=0.5),
        log=LogSettings(level="info", requests=False),
    )


def worker(shape: Shape, name: str, ports: tuple[int, int, int]) -> tuple[WorkerSettings, TransferSettings]:
    """One worker's own sections."""
    port, metrics_port, transfer_port = ports
    simulated = shape.engine == "simulated"
    own = WorkerSettings(
        engine=shape.engine,
        profile=Path("qwen3-32b-h200-tp1") if simulated else None,
        worker_id=name,
        port=port,
        metrics_port=metrics_port,
        max_model_len=2048 if simulated else 1024,
        # A few full contexts: more requests than that have to take turns.
        kv_cache_bytes=384 * _SIMULATED_BLOCK_BYTES if simulated else 2 << 20,
        block_tokens=16 if simulated else 32,
        max_batched_tokens=512 if simulated else 64,
        max_running=16,
        threads=1,
        drain_timeout_s=10.0,
    )
    transfer = TransferSettings(
        transport="shm",
        mode="staged",
        port=transfer_port,
        lease_s=LEASE_S,
        timeout_s=4.0,
        silence_s=1.5,
        landing_bytes=1 << 20,
        board_slots=64,
    )
    return own, transfer
