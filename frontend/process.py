"""The frontend's process: both faces in one event loop, from listening to the last open request.

uvloop.run(serve(settings))
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import grpc.aio
import uvicorn
from prometheus_client import REGISTRY, CollectorRegistry, multiprocess
from prometheus_client.registry import Collector
from starlette.types import ASGIApp

from frontend import access_log
from frontend.admission.cluster_room import others_of, room_of
from frontend.admission.gate import AdmissionGate
from frontend.admission.tenants import Tenants
from frontend.cluster_state import TellsState
from frontend.cold_start import ColdStarts
from frontend.explanation import Explainer, Explains
from frontend.generation import Dispatcher
from frontend.grpc_face import GrpcFace
from frontend.http_face import create_app
from frontend.http_protocol import Doorkeeper
from frontend.inference import InferenceService
from frontend.keys.guard import Guard
from frontend.keys.opening import guarding
from frontend.keys.table import SharedTable
from frontend.pool_peers import answering
from frontend.pool_processes import PoolProcesses
from frontend.tokenizer import TextModel
from frontend.traffic_report import TrafficReporter
from frontend.worker_speeds import WorkerSpeeds
from slipstream import cycle_collector, exposure, grpc_wakeups, lossy_streams, telemetry, tracing
from slipstream.addresses import host_port
from slipstream.background import background
from slipstream.errors import StartupError
from slipstream.limit_settings import DEFAULT_LIMITS, LimitSettings
from slipstream.loop_tasks import tasks_shown
from slipstream.security import identity
from slipstream.security.expiry import CertificateCollector
from slipstream.security.http_ends import face_context
from slipstream.security.names import ComponentRole
from slipstream.security.servers import listen_publicly
from slipstream.settings import FrontendSettings, Settings

log = telemetry.get_logger(__name__)

REGISTRY.register(CertificateCollector())

BACKLOG_CONNECTIONS = 2048
# For connections that were told of the shutdown to be closed properly.
_LAST_WORDS_S = 2.0
# Open files asked for, and how few are worth a warning.
_OPEN_FILES = 1 << 16
_FEW_OPEN_FILES = 4096
# Open files that are no client's connection: workers, the gRPC face, logs.
_OTHER_FILES = 256
_FEWEST_CONNECTIONS = 16


async def serve(settings: Settings, *, pool_folder: Path | None = None, member: int = 0) -> None:
    """Run both faces until SIGTERM or SIGINT, then let open requests finish for `frontend.drain_timeout_s`.

    Args:
        pool_folder: where the processes of a pool (`frontend.pool`) keep their counts, and find each other; None
            outside of one.
        member: the place of this process in the pool.

    Raises:
        StartupError: a port is taken, the model folder is not usable, the control plane's settings are wrong.
    """
    # Late, so that tests of the faces need neither the cluster's client nor a model.
    from frontend.dispatch import open_dispatcher
    from frontend.state_teller import StateTeller
    from slipstream import model_folder

    raise_file_limit()
    grpc_wakeups.install()
    lossy_streams.install()
    identity.install(settings.security, ComponentRole.FRONTEND)
    exposure.check_faces(settings)
    with (
        stop_signals() as stop,
        bound_socket(settings.frontend) as http_socket,
        access_log.writing(settings.log),
        tasks_shown(REGISTRY),
        tracing.exporting(
            settings.tracing, service="slipstream-frontend", instance=f"{socket.gethostname()}-{os.getpid()}"
        ),
    ):
        folder = await asyncio.to_thread(model_folder.resolve, settings.model, weights=False)
        text_model = await asyncio.to_thread(TextModel.load, Path(folder.path))
        cycle_collector.look_seldom()
        async with open_dispatcher(settings) as dispatcher:
            gate = AdmissionGate(
                dispatcher,
                settings.admission,
                request_timeout_s=settings.frontend.request_timeout_s,
                room=lambda: room_of(dispatcher.records()),
                others=partial(others_of, dispatcher.routing.fleet),
            )
            name = settings.served_model_name or folder.served_name
            tenants = Tenants(settings.admission)
            teller = StateTeller(dispatcher, gate, tenants, model_name=name, draining=stop.is_set)
            cold = ColdStarts(settings.admission.queue)
            reporter = TrafficReporter(
                settings.control_plane.address,
                lambda: gate.queued() | cold.queued(),
                speeds=WorkerSpeeds(dispatcher.routing.fleet).take,
                take_on_demand=cold.take,
            )
            table = _shared_accounts(settings, pool_folder, member)
            async with (
                background(reporter.follow(), name="traffic-report"),
                _explaining(pool_folder, Explainer(dispatcher.routing.decisions, gate.accounts)) as explain,
                guarding(settings, table, check_peer=tenants.check_peer) as guard,
            ):
                await run_faces(
                    settings.frontend,
                    gate,
                    text_model,
                    model_name=name,
                    http_socket=http_socket,
                    stop=stop,
                    tenants=tenants,
                    cold=cold,
                    metrics=_metrics_of_all(pool_folder),
                    explain=explain,
                    tells_state=teller.tell,
                    limits=settings.limits,
                    guard=guard,
                )


async def run_faces(
    settings: FrontendSettings,
    dispatcher: Dispatcher,
    text_model: TextModel,
    *,
    model_name: str,
    http_socket: socket.socket,
    stop: asyncio.Event,
    listening: Callable[[str, str], None] = lambda http, grpc: None,
    tenants: Tenants | None = None,
    cold: ColdStarts | None = None,
    metrics: Collector = REGISTRY,
    explain: Explains | None = None,
    tells_state: TellsState | None = None,
    limits: LimitSettings = DEFAULT_LIMITS,
    guard: Guard | None = None,
) -> None:
    """Serve on `http_socket` and the gRPC port until `stop` is set, then drain.

    Args:
        listening: called with the HTTP and the gRPC address once both accept.
        tenants: who they are; `dispatcher` does the rest of admission.
        cold: where requests wait for a worker that is started for them.
        metrics: what /metrics shows.
        explain: what the dispatcher decided, for those who ask why.
        tells_state: what global frontends are told of the cluster.
        limits: of clients.
        guard: who may come in; everybody without.

    Raises:
        StartupError: the gRPC port is taken.
    """
    service = InferenceService(
        dispatcher,
        text_model,
        model_name=model_name,
        request_timeout_s=settings.request_timeout_s,
        max_n=settings.max_n,
        tenants=tenants,
        cold=cold,
        isolates_tenants=settings.prefix_cache == "tenant",
    )
    grpc_face = GrpcFace(
        service,
        max_message_bytes=settings.max_body_bytes,
        shares_port=settings.workers > 1,
        guard=guard,
        limits=limits,
    )
    grpc_port = bind_grpc(grpc_face.server, settings)
    server = http_server(
        create_app(
            service,
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=limits.body_timeout_s,
            metrics=metrics,
            explain=explain,
            tells_state=tells_state,
            guard=guard,
        ),
        settings,
        limits,
    )
    http_socket.listen(BACKLOG_CONNECTIONS)
    try:
        await grpc_face.start()
        async with asyncio.TaskGroup() as tasks:
            http_task = tasks.create_task(server.serve([http_socket]), name="http face")
            health_task = tasks.create_task(grpc_face.watch_readiness(), name="grpc health")
            http_address = host_port(settings.host, http_socket.getsockname()[1])
            grpc_address = host_port(settings.host, grpc_port)
            log.info("frontend_listening", http=http_address, grpc=grpc_address, model=model_name)
            listening(http_address, grpc_address)
            await stop.wait()
            log.info("frontend_draining", timeout_s=settings.drain_timeout_s)
            server.should_exit = True
            drain_task = tasks.create_task(_end_requests_after(service, settings.drain_timeout_s), name="drain")
            await grpc_face.stop(settings.drain_timeout_s + _LAST_WORDS_S)
            await http_task
            drain_task.cancel()
            health_task.cancel()
    finally:
        await grpc_face.stop(0)
    log.info("frontend_stopped")


def _shared_accounts(settings: Settings, folder: Path | None, member: int) -> SharedTable | None:
    """Of the keys, where a pool's processes keep their rates together. Closed by the process' end."""
    return None if folder is None else SharedTable(folder / "keys", member, settings.frontend.workers)


@contextlib.asynccontextmanager
async def _explaining(pool_folder: Path | None, explainer: Explainer) -> AsyncIterator[Explains]:
    if pool_folder is None:
        yield explainer.find
        return
    async with answering(pool_folder, explainer) as peers:
        yield peers.find


def _metrics_of_all(folder: Path | None) -> Collector:
    if folder is None:
        return REGISTRY
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    registry.register(PoolProcesses(folder, os.getppid()))
    registry.register(CertificateCollector())
    return registry


def raise_file_limit() -> None:
    """As many open files as the system lets this process have: each stream is a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < _FEW_OPEN_FILES:
        log.warning("few_open_files", limit=wanted, remedy="raise the hard limit (ulimit -Hn): each stream needs one")


async def _end_requests_after(service: InferenceService, drain_timeout_s: float) -> None:
    # Before the servers cancel what is left: a request ended here still gets an error it can read.
    await asyncio.sleep(drain_timeout_s)
    service.close()


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    caught = (signal.SIGTERM, signal.SIGINT)
    for number in caught:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in caught:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def bound_socket(settings: FrontendSettings) -> Iterator[socket.socket]:
    """The HTTP face's port, taken before anything slow is done.

    Raises:
        StartupError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if settings.workers > 1:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            bound.bind((settings.host, settings.http_port))
        except OSError as error:
            raise port_error("http_port", settings.host, settings.http_port, error.strerror or str(error)) from error
        yield bound


def bind_grpc(server: grpc.aio.Server, settings: FrontendSettings) -> int:
    """The gRPC face's port, once it is taken.

    Raises:
        StartupError: it cannot be had.
    """
    try:
        return listen_publicly(server, host_port(settings.host, settings.grpc_port))
    except RuntimeError as error:
        raise port_error("grpc_port", settings.host, settings.grpc_port, str(error)) from error


def port_error(setting: str, host: str, port: int, reason: str) -> StartupError:
    """What to say when a face's port cannot be had."""
    return StartupError(
        f"Cannot listen on {host_port(host, port)}: {reason}. Set frontend.{setting} to another port, or to 0 for a "
        "free one, or end the process that holds it."
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals are the process's, and end both faces."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: ASGIApp, settings: FrontendSettings, limits: LimitSettings) -> uvicorn.Server:
    """What serves an application as all our HTTP faces do.

    Raises:
        ConfigError: the faces' certificate cannot be read.
    """
    tls = face_context()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = max(_FEWEST_CONNECTIONS, min(limits.max_connections, files - _OTHER_FILES))
    return _Server(
        uvicorn.Config(
            app,
            http=cast("type[asyncio.Protocol]", Doorkeeper(limits, most=most).protocol),
            ws="none",
            lifespan="off",
            proxy_headers=False,  # nobody here looks at the client's address
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            backlog=BACKLOG_CONNECTIONS,
            timeout_keep_alive=math.ceil(limits.keep_alive_s),
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s + _LAST_WORDS_S),
            ssl_context_factory=(lambda config, default: tls) if tls is not None else None,
        )
    )
