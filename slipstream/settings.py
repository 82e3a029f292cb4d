"""The one typed configuration: what can be set, its unit, its limits and its default.

Here is the data only. `slipstream.config` fills it from flags, environment and one YAML file and remembers
where each value came from; components receive the section they need and read nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from slipstream.limit_settings import LimitSettings
from slipstream.security_settings import SecuritySettings
from slipstream.settings_section import Section

DEFAULT_MODEL = "smollm2-135m-instruct"


class ControlPlaneSettings(Section):
    """Where the registry listens, and where the others find it."""

    host: str = Field("127.0.0.1", description="address the control plane listens on")
    port: int = Field(7600, ge=0, le=65535, description="port the control plane listens on; 0 takes a free one")
    address: str = Field("127.0.0.1:7600", description="host:port under which workers and frontends find it")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of its /metrics and /targets; 0 takes a free one, which its log names"
    )
    lease_s: float = Field(6.0, ge=0.5, le=300, description="a worker that has not renewed for this long is forgotten")


class FrontendSettings(Section):
    """The public faces."""

    host: str = Field("127.0.0.1", description="address the HTTP and gRPC faces listen on")
    http_port: int = Field(8000, ge=0, le=65535, description="port of the OpenAI-compatible HTTP face")
    grpc_port: int = Field(8001, ge=0, le=65535, description="port of the gRPC face")
    workers: int = Field(
        1, ge=1, le=64, description="processes that serve on these ports; one for each core that the faces may use"
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30, description="largest request body accepted")
    max_n: int = Field(16, ge=1, le=128, description="largest `n` accepted")
    request_timeout_s: float = Field(600.0, gt=0, le=86400, description="longest a request may take in all")
    prefill_timeout_s: float = Field(
        120.0,
        gt=0,
        le=3600,
        description="longest wait for a prefill worker to compute a prompt before decode does it alone",
    )
    prefill_silence_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="a prefill worker that has prompts and is seen to compute nothing for this long (and for three "
        "times a prompt's predicted time) is left for another one; only where workers tell what they cache",
    )
    first_token_timeout_s: float = Field(
        120.0,
        gt=0,
        le=3600,
        description="longest wait for the first token from a decode worker, once the prompt is computed",
    )
    token_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="longest wait for the next token from a decode worker"
    )
    max_attempts: int = Field(
        3,
        ge=1,
        le=10,
        description="dispatches of one request before a worker's refusal or failure is reported; lost workers count by "
        "`max_migrations`",
    )
    max_migrations: int = Field(
        3, ge=0, le=10, description="workers that may be lost with one request on board before it goes to no other one"
    )
    migration_share: float = Field(
        1.0,
        ge=0,
        le=100,
        description="requests that may go to other workers within 10 s because theirs were lost, as a share of all "
        "that were with the workers in that time; 16 always may, but with 0 none",
    )
    migration_wait_s: float = Field(
        10.0,
        ge=0,
        le=600,
        description="longest a request waits for a decode worker when its own was lost and no other is there",
    )
    policy: Literal["kv", "session", "load", "round_robin", "power_of_two"] = Field(
        "kv",
        description="how workers are chosen: `kv` by predicted time, with what is cached where; `session` the same "
        "workers for the same `x-session-id` or `user`, others as `kv`; the rest are for comparison",
    )
    handoff: Literal["auto", "always"] = Field(
        "auto",
        description="`auto` lets a decode worker compute a prompt alone where a handoff is predicted not to be worth "
        "it; `always` hands over whenever there is a prefill worker",
    )
    prefix_cache: Literal["shared", "tenant"] = Field(
        "shared",
        description="who shares computed prompts: `shared` all, whose cache tells by its speed what others have asked; "
        "`tenant` only requests of one tenant",
    )
    write_back: bool = Field(True, description="let a prefill worker fetch from decode workers what they generated")
    drain_timeout_s: float = Field(30.0, ge=0, le=3600, description="how long open requests may go on after SIGTERM")


class TenantSettings(Section):
    """One tenant, known by its keys in the key file, or by the SHA-256 of one: `printf %s "$KEY" | sha256sum`."""

    name: str = Field(pattern=r"^[A-Za-z0-9._:@-]{1,64}$", description="in metrics and logs")
    key_sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of an API key of it, in hexadecimal; not needed for keys of `security.keys_file`",
    )
    weight: float = Field(1.0, gt=0, le=1e6, description="share of a contended cluster, relative to other tenants")
    priority: Literal["realtime", "nearline", "batch"] = Field(
        "realtime", description="highest class of its requests, and their class when they name none"
    )


class AdmissionSettings(Section):
    """Who waits, who goes first and who is refused when more is asked of the cluster than it can do."""

    default_class: Literal["realtime", "nearline", "batch"] = Field(
        "realtime", description="class of requests that name none"
    )
    realtime_queue: int = Field(2048, ge=0, le=1 << 20, description="realtime requests that may wait in a frontend")
    nearline_queue: int = Field(2048, ge=0, le=1 << 20, description="nearline requests that may wait in a frontend")
    batch_queue: int = Field(4096, ge=0, le=1 << 20, description="batch requests that may wait in a frontend")
    queue: int = Field(
        4096, ge=0, le=1 << 20, description="requests of all classes that may wait; beyond that lower classes give way"
    )
    realtime_wait_s: float = Field(
        30.0,
        gt=0,
        le=86400,
        description="a realtime request whose turn is predicted to come later than this is refused, with a time at "
        "which it will be let in",
    )
    nearline_wait_s: float = Field(60.0, gt=0, le=86400, description="the same for nearline requests")
    batch_wait_s: float = Field(600.0, gt=0, le=86400, description="the same for batch requests")
    worker_wait_s: float = Field(
        0.02,
        ge=0,
        le=60,
        description="predicted wait at the workers up to which requests go to them; half of "
        "`ttft_slo_s` where it is more and all that comes is of one tenant and class",
    )
    ttft_slo_s: float = Field(
        2.0,
        gt=0,
        le=3600,
        description="time to first token realtime requests shall have; batch requests in flight are taken back for it",
    )
    max_preemptions: int = Field(
        2, ge=0, le=100, description="times one batch request may be taken from the workers; 0 turns that off"
    )
    aging_s: float = Field(
        10.0, gt=0, le=3600, description="wait after which a lower class gets a tenth of the work whatever else waits"
    )
    tenants: tuple[TenantSettings, ...] = Field(
        (), description="tenants by API key: a list in the YAML file; see docs/admission.md"
    )
    peer_key_sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}(,[0-9a-f]{64})*$",
        description="SHA-256 of the keys of global frontends that may use this cluster, with commas between; none may "
        "when absent (see docs/global-frontend.md)",
    )


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


class LogSettings(Section):
    """What is written down, and where."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level written")
    format: Literal["console", "json"] = Field("console", description="lines for people, or one JSON object a line")
    requests: bool = Field(True, description="write a line for each request that a frontend has answered")
    access_log: Path | None = Field(
        None, description="file to which frontends add one JSON line for each answered request, which can be replayed"
    )
    audit_log: Path | None = Field(
        None,
        description="file to which each process adds one JSON line for each administrative action; they go among the "
        "other log lines when absent (see docs/security/audit-log.md)",
    )
    access_log_blocks: bool = Field(
        False, description="name the blocks of each prompt in the access log, so that a replay has the same prefixes"
    )


class TracingSettings(Section):
    """Traces of requests, in OpenTelemetry's protocol."""

    endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="where a collector takes OTLP over gRPC, as http://host:4317; nothing is traced when absent",
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of requests that are traced, of those whose caller has not decided it"
    )
    export_every_s: float = Field(2.0, ge=0.05, le=60, description="longest a finished span waits to be sent")


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


class PeerClusterSettings(Section):
    """One cluster behind a global frontend."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="in headers, metrics and logs")
    http: tuple[str, ...] = Field(min_length=1, max_length=64, description="http(s)://host:port of its frontends")
    grpc: tuple[str, ...] = Field(
        (), max_length=64, description="host:port of the same frontends' gRPC faces, in the same order"
    )
    key: str | None = Field(None, min_length=1, description="the key by which it knows this global frontend")
    key_file: Path | None = Field(None, description="file that holds the key, instead of `key`")
    ca_file: Path | None = Field(None, description="certificates to trust with https; the system's when absent")
    max_in_flight: int = Field(1024, ge=1, le=1 << 20, description="requests sent to it at the same time")


class GlobalFrontendSettings(Section):
    """A frontend before several clusters. Its faces are those of `frontend`."""

    clusters: tuple[PeerClusterSettings, ...] = Field(
        (), description="the clusters: a list in the YAML file; see docs/global-frontend.md"
    )
    poll_every_s: float = Field(1.0, ge=0.05, le=60, description="between two questions to a cluster how it is")
    stale_after_s: float = Field(
        5.0, ge=0.2, le=600, description="a cluster that has said nothing for this long gets no requests"
    )
    connect_timeout_s: float = Field(2.0, gt=0, le=60, description="longest wait for a connection to a cluster")
    silence_timeout_s: float = Field(
        90.0, gt=0, le=3600, description="longest pause within a streamed answer before its cluster is taken for lost"
    )
    max_attempts: int = Field(3, ge=1, le=10, description="clusters tried for one request")


class Settings(Section):
    """All of it. Sections are named as in the YAML file."""

    model: str = Field(
        DEFAULT_MODEL,
        description="a local folder, a Hugging Face id, or the name of the packaged default model",
    )
    served_model_name: str | None = Field(None, description="name clients use; taken from the model when absent")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the engine computes")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights and KV cache; auto is float32 on a CPU without AVX512-BF16"
    )
    api_key: SecretStr | None = Field(
        None,
        description="API key with which commands ask a frontend; in SLIPSTREAM_API_KEY other users of this machine do "
        "not see it, as they see flags",
    )
    control_plane: ControlPlaneSettings = ControlPlaneSettings()
    frontend: FrontendSettings = FrontendSettings()
    limits: LimitSettings = LimitSettings()
    admission: AdmissionSettings = AdmissionSettings()
    worker: WorkerSettings = WorkerSettings()
    model_cache: ModelCacheSettings = ModelCacheSettings()
    simulated: SimulatedSettings = SimulatedSettings()
    transfer: TransferSettings = TransferSettings()
    health: HealthSettings = HealthSettings()
    security: SecuritySettings = SecuritySettings()
    log: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    cluster: ClusterSettings = ClusterSettings()
    ray: RaySettings = RaySettings()
    planner: PlannerSettings = PlannerSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    global_frontend: GlobalFrontendSettings = GlobalFrontendSettings()
