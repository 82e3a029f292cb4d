"""The process that hosts a role: engine, gRPC server, registration, metrics, and an orderly end.

Every worker serves the calls of both roles; its role is what its record says, and can be changed while it runs
(`Worker.SetRole`). The packages of the roles bring only their gRPC services; everything around them is here.

The order at the start: take the ports, say STARTING in the registry, load the engine, say READY. At the end: say
DRAINING, refuse new requests, let open ones finish until `worker.drain_timeout_s`, deregister, stop the engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2

from engine import environment, follower_process, host_id
from engine.admission import Admission
from engine.cache_feed import CacheFeed
from engine.health.metrics import HealthCollector
from engine.health.nvml import open_devices
from engine.health.readings import DeviceHealth, NoDevices
from engine.health.watch import HealthWatch, cache_folder
from engine.loading import checked_model, end_despite_load, first_of, in_daemon_thread, own_board
from engine.node_group import NodeGroup
from engine.node_tie import Leader, Shared, facts_of
from engine.path_watch import PathWatch
from engine.protocol import Engine
from engine.simulated.profile_choice import profile_of
from engine.standstill import Standstill
from engine.startup import Startup, StartupCollector, process_age_s
from engine.worker_metrics import MetricsServer
from engine.worker_service import LIVE_SERVICE, WorkerService, add_standard_services
from kv_transfer.board import Board
from kv_transfer.identity import Identity
from slipstream import cycle_collector, grpc_wakeups, lossy_streams, telemetry, tracing
from slipstream.addresses import host_port
from slipstream.background import background
from slipstream.errors import EngineDeadError, StartupError, WorkerDrainingError
from slipstream.grpc_channels import server_options
from slipstream.loop_tasks import LoopTasks
from slipstream.model_folder import ModelFolder
from slipstream.performance import encode_profile, read_profile
from slipstream.registration import Registration
from slipstream.security import audit, identity
from slipstream.security.names import ComponentRole
from slipstream.security.servers import create_server, listen
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import (
    Health,
    HealthState,
    Role,
    TransferEndpoint,
    TransferPath,
    WorkerRecord,
    WorkerState,
)
from slipstream.worker_settings import WorkerSettings

log = telemetry.get_logger(__name__)

_ENGINE_CHECK_S = 0.5

AddServices = Callable[[grpc.aio.Server, Engine, Admission, Board, str, Settings], tuple[str, ...]]
"""Adds the roles' gRPC services (engine, admission, board, served model name, settings), returns their full names."""


def run(settings: Settings, role: Role.ValueType, add_services: AddServices) -> None:
    """Host a worker, which begins in this role, until SIGTERM or SIGINT; or, where its ranks are on several nodes, this
    node's part of it.

    Raises:
        ConfigError: settings that do not fit each other.
        StartupError: a port is taken, the model cannot be found or loaded.
        EngineDeadError: the engine died; the process should end with a failure, so that it is started again.
    """
    environment.prepare(settings, os.environ)
    grpc_wakeups.install()
    lossy_streams.install()
    name = "prefill" if role == Role.ROLE_PREFILL else "decode"
    worker_id = settings.worker.worker_id or f"{name}-{socket.gethostname()}-{os.getpid()}"
    telemetry.configure(settings.log, component=worker_id)
    audit.configure(settings.log.audit_log, worker_id)
    identity.install(settings.security, ComponentRole.WORKER)
    group = NodeGroup.of(settings.worker)
    if group.follows:
        follower_process.run(settings, group, role, worker_id)
        return
    host = _Host(settings, role, worker_id)
    try:
        uvloop.run(host.serve(add_services))
    except StartupError as error:
        if not host.load_abandoned:
            raise
        log.error("worker_failed", error=error.message)
        end_despite_load(1)
    if host.load_abandoned:
        end_despite_load(0)


class _Host:
    def __init__(self, settings: Settings, role: Role.ValueType, worker_id: str) -> None:
        self._settings = settings
        self._group = NodeGroup.of(settings.worker)
        self._identity = Identity()
        self._tie: Leader | None = None
        self._role = role
        self._first_role = "prefill" if role == Role.ROLE_PREFILL else "decode"
        self._worker_id = worker_id
        self._state = WorkerState.STARTING
        self._started_s = int(time.time())
        self._epoch = time.time_ns()
        self._model = ""
        self._address = ""
        self._metrics_url = ""
        self._device = ""
        self._engine: Engine | None = None
        self._path_watch: PathWatch | None = None
        self._metrics: MetricsServer | None = None
        self._registration: Registration | None = None
        self._health: HealthWatch | None = None
        self._fenced_unix_s = 0
        self._fenced_because = ""
        self._standstill: Standstill | None = None
        self._admission = Admission(limit=settings.worker.max_running + settings.worker.max_waiting)
        self._startup = Startup(process_age_s())
        self._registering_s = 0.0
        self._stop = asyncio.Event()
        self.load_abandoned = False

    def record(self) -> WorkerRecord:
        """This worker as it is now."""
        engine = self._engine
        return WorkerRecord(
            worker_id=self._worker_id,
            role=self._role,
            state=self._told_state,
            model=self._model,
            address=self._address,
            metrics_url=self._metrics_url,
            host_id=host_id.read(),
            epoch=self._epoch,
            pid=os.getpid(),
            started_unix_s=self._started_s,
            device=self._device,
            capacity=engine.capacity() if engine else None,
            load=self._admission.work.load(engine.load()) if engine else None,
            transfer=engine.transfer() if engine else None,
            paths=self._paths(),
            health=self._health_message(),
            node=self._settings.worker.node,
            startup=self._startup.message(),
        )

    @property
    def _told_state(self) -> WorkerState.ValueType:
        fenced = self._fenced_unix_s or self._stands_still
        return WorkerState.FENCED if fenced and self._state == WorkerState.READY else self._state

    @property
    def _stands_still(self) -> bool:
        return self._standstill is not None and self._standstill.now

    def set_fence(self, fenced: bool, because: str) -> None:
        """Say from now on that nothing new shall be sent here, or that it may be again.

        Raises:
            WorkerDrainingError: it is not ready, or about to end.
        """
        if self._state != WorkerState.READY:
            raise WorkerDrainingError("this worker is not ready: it is not fenced")
        if fenced == bool(self._fenced_unix_s):
            return
        log.warning("fenced" if fenced else "unfenced", because=because)
        self._fenced_unix_s = int(time.time()) if fenced else 0
        self._fenced_because = because if fenced else ""
        if self._registration is not None:
            self._registration.push()

    def _health_message(self) -> Health | None:
        if self._health is None and not self._fenced_unix_s and not self._stands_still:
            return None
        health = self._health.message() if self._health is not None else Health()
        health.fenced_unix_s, health.fenced_because = self._fenced_unix_s, self._fenced_because
        if self._standstill is not None:
            self._standstill.tell(health)
        return health

    def set_role(self, role: Role.ValueType) -> None:
        """Take that role: what is told of this worker from now on. Its requests do not notice.

        Raises:
            WorkerDrainingError: it is about to end.
        """
        if self._state == WorkerState.DRAINING:
            raise WorkerDrainingError("this worker is draining: its role is not changed any more")
        if role == self._role:
            return
        log.info("role_changed", role=Role.Name(role).removeprefix("ROLE_").lower())
        self._role = role
        if self._metrics is not None:
            self._metrics.role = role
        if self._path_watch is not None:
            self._path_watch.take_role(role)
        if self._registration is not None:
            self._registration.push()

    async def serve(self, add_services: AddServices) -> None:
        settings, worker = self._settings, self._settings.worker
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        with self._startup.phase("model"):
            folder = await self._fetched_model()
        if folder is None:  # stopped while fetching
            return
        self._model = settings.served_model_name or folder.served_name
        profile = _profile(worker)
        admission = self._admission
        async with AsyncExitStack() as owned:
            server = create_server(server_options())
            self._address = host_port(worker.host, _bind(server, worker.host, worker.port))
            board = owned.enter_context(own_board(settings.transfer.board_slots))
            metrics = owned.enter_context(
                MetricsServer(worker.host, worker.metrics_port, self._role, self._worker_id, model=self._model)
            )
            self._metrics, self._metrics_url = metrics, metrics.url
            self._registration = registration = await owned.enter_async_context(
                Registration(settings.control_plane.address, self.record, on_first=self._note_registered)
            )
            self._registering_s = self._startup.since_start_s()
            metrics.add(StartupCollector(self._startup, metrics.labels))
            metrics.add(LoopTasks(asyncio.get_running_loop()))
            if self._group.several:
                tie = Leader(
                    self._group,
                    host_id.read(),
                    await asyncio.to_thread(facts_of, settings, folder),
                    Shared(board.epoch, board.seed, self._identity.public),
                )
                self._tie = await owned.enter_async_context(tie.serving(worker.host))
            engine = await owned.enter_async_context(self._loaded_engine(folder.path, board))
            if engine is None:  # stopped while loading
                return
            self._startup.engine_loaded(board)
            self._engine = engine
            # After the engine, which forks: what is entered here starts threads.
            owned.enter_context(
                tracing.exporting(settings.tracing, service=f"slipstream-{self._first_role}", instance=self._worker_id)
            )
            self._path_watch = PathWatch(
                settings.control_plane.address,
                role=self._role,
                model=self._model,
                admit=engine.admit,
                probe=self._timed_probe,
                on_change=registration.push,
                measures=settings.transfer.probe,
            )
            metrics.watch(engine, board, admission, self._paths)
            await owned.enter_async_context(self._watching_health(metrics, registration))
            names = add_services(server, engine, admission, board, self._model, settings)
            feed = CacheFeed(engine, admission.work, model=self._model, epoch=self._epoch, profile=profile)
            owned.callback(feed.close)
            await owned.enter_async_context(background(feed.follow(), name="cache-feed"))
            health_service = add_standard_services(
                server, names, WorkerService(self.record, self.set_role, engine, feed, self.set_fence)
            )
            await server.start()
            cycle_collector.leave_out_what_is_there()
            self._state = WorkerState.READY
            self._startup.ready()
            # Until the process ends: it lives, also while it drains and takes nothing new.
            await health_service.set(LIVE_SERVICE, health_pb2.HealthCheckResponse.SERVING)
            await health_service.set("", health_pb2.HealthCheckResponse.SERVING)
            registration.push()
            log.info("worker_ready", address=self._address, metrics=self._metrics_url, model=self._model)
            log.info("startup_phases", **{f"{name}_s": round(s, 3) for name, s in self._startup.seconds.items()})
            try:
                async with self._measuring_paths():
                    await self._until_stopped(engine, board)
            finally:
                self._state = WorkerState.DRAINING
                admission.drain()
                await health_service.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
                registration.push()
                await self._drain(admission, engine)
                admission.close()
                feed.close()
                await server.stop(grace=1.0)
        log.info("worker_stopped")

    @asynccontextmanager
    async def _watching_health(self, metrics: MetricsServer, registration: Registration) -> AsyncIterator[None]:
        """Watch device and node while the block runs, unless `health.watch` is off."""
        limits = self._settings.health
        if not limits.watch:
            yield
            return

        def devices() -> DeviceHealth:
            if self._device != "cuda":
                return NoDevices()
            count = self._group.local_ranks if limits.devices is None else limits.devices
            return open_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), count)

        self._health = watch = HealthWatch(
            limits, self._worker_id, devices, cache=cache_folder(), on_change=registration.push
        )
        metrics.add(HealthCollector(watch, metrics.labels))
        async with background(watch.follow(), name="health"):
            yield

    def _note_registered(self) -> None:
        self._startup.seconds["registration"] = self._startup.since_start_s() - self._registering_s

    async def _timed_probe(self, worker_id: str, peer: TransferEndpoint, transport: str) -> TransferPath:
        """`Engine.probe_path`, whose first measurement is a phase of the start."""
        assert self._engine is not None
        if "path_test" in self._startup.seconds:
            return await self._engine.probe_path(worker_id, peer, transport)
        with self._startup.phase("path_test"):
            return await self._engine.probe_path(worker_id, peer, transport)

    def _paths(self) -> Sequence[TransferPath]:
        return self._path_watch.paths if self._path_watch else ()

    @asynccontextmanager
    async def _measuring_paths(self) -> AsyncIterator[None]:
        """Meet the peers that come while the block runs."""
        assert self._path_watch is not None
        async with background(self._path_watch.follow(), name="path-watch"):
            yield

    async def _fetched_model(self) -> ModelFolder | None:
        """The model's folder, fetched in a thread: that may take minutes, and a wish to stop is heard meanwhile."""
        fetching = in_daemon_thread(lambda: checked_model(self._settings))
        # No deadline: it downloads, and each of the hub client's waits has one; so has a wait for another process.
        if await first_of(fetching, self._stop):
            return fetching.result()
        self.load_abandoned = True
        log.warning("load_abandoned", stopped=True)
        return None

    @asynccontextmanager
    async def _loaded_engine(self, model_path: Path, board: Board) -> AsyncIterator[Engine | None]:
        """The engine, loaded in a thread so that the registration goes on; None when stopped meanwhile."""
        if self._settings.worker.engine == "simulated":
            async with self._simulated_engine(model_path, board) as simulated:
                yield simulated
            return
        limit_s = self._settings.worker.start_timeout_s
        if not await self._all_nodes_here(limit_s):
            yield None
            return
        loading = in_daemon_thread(lambda: self._load_engine(model_path, board))
        ends = (self._stop, self._tie.lost, self._tie.stopping) if self._tie is not None else (self._stop,)
        if not await first_of(loading, *ends, limit_s=limit_s):
            self.load_abandoned = True
            log.warning("load_abandoned", stopped=self._stop.is_set())
            if self._node_lost:
                raise StartupError(self._node_lost, code="node_lost")
            if not any(end.is_set() for end in ends):
                raise StartupError(f"the engine did not load within {limit_s:g} s (worker.start_timeout_s)")
            yield None
            return
        engine = loading.result()
        try:
            yield engine
        finally:
            await asyncio.to_thread(engine.shutdown)

    @property
    def _node_lost(self) -> str:
        return self._tie.why if self._tie is not None else ""

    async def _all_nodes_here(self, limit_s: float) -> bool:
        """Wait for the nodes that have the other ranks; False when stopped meanwhile.

        Raises:
            StartupError: they do not come.
        """
        if self._tie is None:
            return True
        waiting = asyncio.ensure_future(self._tie.all_here(limit_s))
        if await first_of(waiting, self._stop):
            waiting.result()
            return True
        waiting.cancel()
        return False

    @asynccontextmanager
    async def _simulated_engine(self, model_path: Path, board: Board) -> AsyncIterator[Engine]:
        """It lives in this event loop, and is there at once."""
        with self._startup.phase("imports"):
            from engine.simulated.engine import running  # late: who computes does not need it

        async with running(self._settings, folder=model_path, served_name=self._model, board=board) as engine:
            self._device = engine.device
            yield engine

    def _load_engine(self, model_path: Path, board: Board) -> Engine:
        # The sockets by which service and engine talk, and the file by which ranks meet, are temporary
        # files: no other user may open them.
        os.umask(0o077)
        with self._startup.phase("imports"):
            from engine.vllm_engine import VllmEngine  # late: it takes seconds, and needs the environment

        with self._startup.phase("engine"):
            engine = VllmEngine(
                self._settings,
                model_path=model_path,
                served_name=self._model,
                board=board,
                identity=self._identity,
            )
            self._device = engine.device
            engine.start()
        return engine

    async def _until_stopped(self, engine: Engine, board: Board) -> None:
        assert self._registration is not None
        self._standstill = standstill = Standstill(
            self._settings.worker,
            self._device,
            board,
            self._admission,
            clock=time.monotonic,
            on_change=self._registration.push,
        )
        while not self._stop.is_set():
            if self._tie is not None and self._tie.stopping.is_set():
                return
            if self._node_lost:
                raise EngineDeadError(self._node_lost, code="node_lost")
            if not engine.alive:
                log.error("engine_died")
                raise EngineDeadError("the engine process has died")
            standstill.look()
            try:
                async with asyncio.timeout(_ENGINE_CHECK_S):
                    await self._stop.wait()
            except TimeoutError:
                continue

    async def _drain(self, admission: Admission, engine: Engine) -> None:
        limit_s = self._settings.worker.drain_timeout_s if engine.alive and not self._node_lost else 0.0
        verdict = self._health.verdict if self._health is not None else None
        if self._fenced_unix_s or (verdict is not None and verdict.state == HealthState.SICK):
            limit_s = min(limit_s, self._settings.health.drain_timeout_s)  # others go on with what is cut off
        log.info("worker_draining", open_requests=admission.open_count, limit_s=limit_s)
        try:
            async with asyncio.timeout(limit_s):
                await admission.idle()
        except TimeoutError:
            if admission.open_count:
                log.warning("drain_cut_short", open_requests=admission.open_count, limit_s=limit_s)


def _profile(worker: WorkerSettings) -> bytes:
    """How fast this worker is, as far as it is known, for its watchers.

    Raises:
        ConfigError: the file cannot be read, or is no profile.
    """
    if worker.engine == "simulated":
        return encode_profile(profile_of(worker))
    return encode_profile(read_profile(worker.profile)) if worker.profile is not None else b""


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    try:
        bound = listen(server, host_port(host, port), what="the worker (worker.host)")
    except RuntimeError as error:
        raise StartupError(f"worker.port: cannot listen on {host}:{port}: {error}") from error
    if bound == 0:
        raise StartupError(f"worker.port: cannot listen on {host}:{port}, is it taken?")
    return bound
