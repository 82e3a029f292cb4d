"""Settings of a worker and of what it has: its models, its engine, its transfers, its health.

Part of `slipstream.settings`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slipstream.settings_section import Section


class WorkerSettings(Section):
    """One prefill or decode worker."""

    engine: Literal["vllm", "simulated"] = Field(
        "vllm", description="what computes: `vllm`, or an engine that only keeps time, for tests and planning"
    )
    profile: Path | None = Field(
        None,
        description="file that says how fast this worker computes (made by `slipstream profile`); helps the router, "
        "and is what the simulated engine keeps time by",
    )
    cache_events: bool = Field(
        True,
        description="tell frontends which KV blocks are in the prefix cache; without it each guesses from its own "
        "requests",
    )
    worker_id: str | None = Field(None, description="name in the registry; made from role, host and pid when absent")
    node: str = Field(
        "", max_length=253, description="name of its node in Kubernetes or Ray; where a sick worker is reported"
    )
    host: str = Field("127.0.0.1", description="address the worker's gRPC and metrics listen on, as others reach it")
    port: int = Field(0, ge=0, le=65535, description="port of its gRPC services; 0 takes a free one")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of its /metrics; 0 takes a free one")
    max_model_len: int | None = Field(
        None, ge=16, description="longest prompt plus answer in tokens; the model's own limit when absent"
    )
    kv_cache_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="memory for the KV cache, of all ranks together; room for four full contexts, within limits, when "
        "absent",
    )
    block_tokens: int | None = Field(None, ge=1, description="tokens a KV block; the engine's choice when absent")
    max_batched_tokens: int | None = Field(
        None, ge=64, description="tokens computed in one engine step; the engine's choice when absent"
    )
    max_running: int = Field(64, ge=1, le=4096, description="requests computed at the same time")
    max_waiting: int = Field(256, ge=0, le=65536, description="requests queued before a worker refuses more")
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="GPUs that the worker's engine spreads the model over (tensor parallelism); a process for each, "
        "also on CPUs",
    )
    nnodes: int = Field(
        1,
        ge=1,
        le=64,
        description="nodes that these GPUs are on, an even part of them on each; the worker is started once on every "
        "node, with the same settings but for `node_rank` and `host`",
    )
    node_rank: int = Field(
        0, ge=0, le=63, description="which of the nodes this is; 0 leads: it registers, and serves requests"
    )
    master_addr: str | None = Field(
        None, max_length=253, description="host name or IP of the node with `node_rank` 0; needed with several nodes"
    )
    master_port: int = Field(
        29501,
        ge=1,
        le=65534,
        description="port of that node at which the engine's ranks find each other; the nodes watch over each other at "
        "the one after it",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of the engine, of all its ranks on this node together; all cores of the process when "
        "absent",
    )
    load_format: Literal["auto", "runai_streamer"] = Field(
        "auto",
        description="how weights are read: `auto` is vLLM's choice, `runai_streamer` reads many pieces at a time while "
        "it loads (extra `streamer`)",
    )
    stream_readers: int = Field(16, ge=1, le=256, description="pieces that the streamer reads at the same time")
    stream_memory_bytes: int | None = Field(
        None, ge=1 << 20, description="memory for what the streamer has read and not loaded yet; no limit when absent"
    )
    drain_timeout_s: float = Field(30.0, ge=0, le=3600, description="how long open requests may go on after SIGTERM")
    start_timeout_s: float = Field(300.0, gt=0, le=7200, description="longest the engine may take to load")
    engine_silence_s: float = Field(
        20.0,
        gt=0,
        le=3600,
        description="an engine that has requests and takes no step for this long (and 50 ms for each token of its "
        "step on a CPU, 2 ms on a GPU) loses them to other workers, and gets no new ones until it does",
    )
    engine_hang_s: float = Field(
        120.0, gt=0, le=7200, description="after so long without a step the worker ends itself, to be started again"
    )


class ModelCacheSettings(Section):
    """Models on a local disk, fetched once for all workers of a machine."""

    folder: Path | None = Field(
        None,
        description="folder on a local disk that models are kept in; workers load from where a model is when absent",
    )
    limit_bytes: int | None = Field(
        None, ge=1, description="most that the models in it may have; those used longest ago go first"
    )
    spare_bytes: int = Field(1 << 30, ge=0, description="disk space that is left free")
    streams: int = Field(8, ge=1, le=64, description="files fetched at the same time")
    timeout_s: float = Field(
        1800.0, gt=0, le=86400, description="longest wait for another process that fetches the same model"
    )


class SimulatedSettings(Section):
    """The simulated engine (worker.engine = simulated)."""

    speed: float = Field(
        1.0, ge=0, le=1e6, description="simulated seconds a real one; 0: as fast as possible, nothing takes time"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the answers: the same prompt and seed, the same tokens")


class TransferSettings(Section):
    """How KV blocks move from prefill to decode."""

    transport: Literal["auto", "shm", "ucx", "nixl"] = Field(
        "auto",
        description="`shm` within one host, `ucx` or `nixl` between hosts; `auto` takes shm where two workers share a "
        "host, else nixl where both have it and an RDMA or EFA device, else ucx",
    )
    mode: Literal["auto", "direct", "staged"] = Field(
        "auto",
        description="shm transport: `direct` reads the sender's memory (process_vm_readv), "
        "`staged` goes through a shared-memory segment, `auto` takes direct where the kernel allows it",
    )
    nixl_backend: Literal["UCX", "LIBFABRIC"] = Field(
        "UCX", description="NIXL backend; LIBFABRIC is the one for AWS EFA"
    )
    compression: Literal["none", "int8", "fp8"] = Field(
        "none",
        description="quantize KV blocks on the wire (ucx and nixl only), for slow links; changes the output a little",
    )
    host: str | None = Field(
        None, description="address the transfer agent listens on, as other workers reach it; worker.host when absent"
    )
    port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port of the transfer agent; 0 takes a free one. Of tensor-parallel ranks each has its own: this "
        "one and those after it",
    )
    lease_s: float = Field(30.0, ge=1, le=600, description="longest blocks are held for a decode worker")
    timeout_s: float = Field(
        10.0, gt=0, le=600, description="longest wait for blocks that are computed before decode recomputes"
    )
    silence_s: float = Field(
        5.0, ge=0.2, le=600, description="a peer from which nothing came for this long is taken for dead"
    )
    resend_budget: int = Field(
        8, ge=0, le=1024, description="spans of one handoff that may be sent again before decode recomputes"
    )
    landing_bytes: int = Field(
        128 << 20,
        ge=1 << 20,
        le=16 << 30,
        description="memory in which blocks land before they are checked, for each rank",
    )
    board_slots: int = Field(1024, ge=16, le=65536, description="handoffs a worker can hold at the same time")
    probe: bool = Field(True, description="measure the path to each new peer at registration")


class HealthSettings(Section):
    """How a worker watches its device and node, and what becomes of a sick one."""

    watch: bool = Field(True, description="watch the worker's GPUs (NVML), its node, and `health.file`")
    devices: int | None = Field(
        None,
        ge=0,
        le=64,
        description="GPUs to watch: the first of CUDA_VISIBLE_DEVICES; all that the worker computes on when absent",
    )
    interval_s: float = Field(5.0, ge=0.1, le=600, description="between two readings")
    file: Path | None = Field(
        None,
        description="file in which people and programs say that workers are sick; a line each: a worker's id or `*`, "
        "`sick` or `suspect`, and why",
    )
    clear_s: float = Field(
        60.0,
        ge=0,
        le=86400,
        description="time that something must not have been seen before it does not count any more",
    )
    throttle_suspect_s: float = Field(
        30.0, gt=0, le=86400, description="time for which hardware slows a GPU down before it is suspect"
    )
    throttle_sick_s: float = Field(
        300.0, gt=0, le=86400, description="time for which hardware slows a GPU down before it is sick"
    )
    corrected_errors_per_hour: int = Field(
        1000, ge=1, description="corrected memory errors within an hour that make a GPU suspect"
    )
    application_xids_per_hour: int = Field(
        3, ge=1, description="Xids within an hour that make a GPU sick although each alone is a process' fault"
    )
    pcie_replays_per_minute: int = Field(8, ge=1, description="PCIe replays within a minute that make a GPU suspect")
    link_errors_per_minute: int = Field(8, ge=1, description="NVLink errors within a minute that make a GPU suspect")
    link_suspect_s: float = Field(
        60.0, gt=0, le=86400, description="time for which a busy GPU's PCIe link is below its best before it is suspect"
    )
    silence_s: float = Field(
        60.0, gt=0, le=3600, description="time for which NVML does not answer before the worker is sick"
    )
    memory_pressure: float = Field(
        0.25,
        gt=0,
        le=1,
        description="share of time in which all of the node's work waits for memory (PSI) that is suspect",
    )
    disk_free_bytes: int = Field(
        1 << 30, ge=0, description="free space of the model cache's disk below which the worker is suspect"
    )
    slow_factor: float = Field(
        1.5, gt=1, le=100, description="times its peers' duration of the same work, above which a worker is slow"
    )
    slow_for_s: float = Field(
        120.0, gt=0, le=86400, description="time for which it must be that slow before it is sick"
    )
    fence: bool = Field(True, description="send nothing new to sick workers, within the limits below")
    most_fenced_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="most of a pool (of one model and role) that may be fenced; always one, if others are ready",
    )
    replacements_per_hour: int = Field(
        4,
        ge=0,
        le=1000,
        description="most workers that are fenced, and replaced, within an hour; beyond that people are told",
    )
    replace: bool = Field(
        True, description="have the planner's scaler start another worker for a fenced one, and end that"
    )
    replacement_timeout_s: float = Field(
        600.0,
        gt=0,
        le=86400,
        description="longest wait for a replacement to be ready before the sick worker is drained anyway",
    )
    drain_timeout_s: float = Field(
        10.0, ge=0, le=3600, description="how long a sick worker's open requests may go on before others take them over"
    )
