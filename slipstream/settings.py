"""The one typed configuration: what can be set, its unit, its limits and its default.

Here is the data only. `slipstream.config` fills it from flags, environment and one YAML file and remembers
where each value came from; components receive the section they need and read nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from slipstream.limit_settings import LimitSettings
from slipstream.placement_settings import ClusterSettings, KubernetesSettings, PlannerSettings, RaySettings
from slipstream.security_settings import SecuritySettings
from slipstream.settings_section import Section
from slipstream.worker_settings import (
    HealthSettings,
    ModelCacheSettings,
    SimulatedSettings,
    TransferSettings,
    WorkerSettings,
)

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
