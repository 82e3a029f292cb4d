"""From settings to the processes of a local cluster: their commands, ports, CPUs and folder.

Children read the resolved settings from one file in the run folder, with flags for what differs between them, and
get no SLIPSTREAM_ variable: what the launcher was told in whatever way is told to them in one way.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deploy import cores
from deploy.processes import Component
from slipstream import config_file, exposure
from slipstream.addresses import host_port, reachable
from slipstream.child_python import module_path
from slipstream.config_layer import ENV_PREFIX
from slipstream.errors import ConfigError, StartupError
from slipstream.free_ports import free_port
from slipstream.security.identity import face_files_of
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Role

CONTROL_PLANE = "control-plane"
FRONTEND = "frontend"

_KEPT_RUNS = 20

# The faces stop taking requests first; workers finish what they have; the registry hears them leave.
STAGE_FRONTEND, STAGE_WORKERS, STAGE_CONTROL_PLANE = range(3)


@dataclass(frozen=True, slots=True)
class PlannedCluster:
    """A cluster that can be started: nothing is left to decide.

    Attributes:
        settings: with every port of the public faces and the control plane resolved.
        components: the processes on this machine.
    """

    settings: Settings
    components: tuple[Component, ...]
    run_folder: Path

    @property
    def http_url(self) -> str:
        scheme = "http" if face_files_of(self.settings.security) is None else "https"
        return f"{scheme}://{host_port(reachable(self.settings.frontend.host), self.settings.frontend.http_port)}"

    @property
    def grpc_target(self) -> str:
        return host_port(reachable(self.settings.frontend.host), self.settings.frontend.grpc_port)


@dataclass(frozen=True, slots=True)
class LocalCluster(PlannedCluster):
    """One whose workers are processes on this machine, too.

    Attributes:
        seats: of the workers, also of those that are started later.
    """

    seats: Seats

    @property
    def worker_names(self) -> frozenset[str]:
        return frozenset(component.name for component in self.components) - {CONTROL_PLANE, FRONTEND}


def plan(
    settings: Settings,
    *,
    environ: Mapping[str, str],
    run_folder: Path,
    cpus: Iterable[int],
    python: str = sys.executable,
) -> LocalCluster:
    """Decide everything, and write the run folder's `slipstream.yaml`.

    Args:
        environ: of the launcher; children get it without what Slipstream would read as settings.
        cpus: the logical CPUs the workers may use.

    Raises:
        ConfigError: a port is taken.
        StartupError: the run folder cannot be written.
    """
    exposure.check_faces(settings)
    resolved = resolve_ports(settings)
    commands = Commands.of(resolved, environ, run_folder, python)
    seats = Seats.of(resolved, sorted(cpus), commands)
    workers = _workers(resolved, seats)
    components = (commands.control_plane(), *workers, commands.frontend())
    return LocalCluster(resolved, components, run_folder, seats)


def default_run_folder(environ: Mapping[str, str], home: Path, now: datetime, pid: int) -> Path:
    """A new folder under the user's state folder (XDG_STATE_HOME, else ~/.local/state)."""
    return state_folder(environ, home) / f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{pid}"


def forget_old_runs(environ: Mapping[str, str], home: Path) -> None:
    """Delete the folders of all but the latest runs, so that logs do not fill the disk over the months."""
    runs = sorted(state_folder(environ, home).glob("[0-9]*T[0-9]*Z-[0-9]*"))
    for old in runs[:-_KEPT_RUNS]:
        shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Commands:
    """What all commands of one cluster share."""

    program: tuple[str, ...]
    config_file: Path
    environ: Mapping[str, str]
    run_folder: Path

    @classmethod
    def of(cls, settings: Settings, environ: Mapping[str, str], run_folder: Path, python: str) -> Commands:
        """Write the run folder's `slipstream.yaml`, which all of them read.

        Raises:
            StartupError: the run folder cannot be written.
        """
        file = run_folder / "slipstream.yaml"
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            config_file.write(settings, file)
        except OSError as error:
            message = f"the run folder {run_folder} cannot be written ({error.strerror}); choose another with --log-dir"
            raise StartupError(message) from None
        return cls((python, "-P", "-m", "slipstream"), file, child_environ(environ), run_folder)

    def control_plane(self) -> Component:
        arguments = ["planner", "serve"]
        return self.component(CONTROL_PLANE, arguments, stop_stage=STAGE_CONTROL_PLANE, essential=True)

    def frontend(self) -> Component:
        return self.component(FRONTEND, ["frontend"], stop_stage=STAGE_FRONTEND, essential=True)

    def component(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        stop_stage: int,
        cpus: tuple[int, ...] = (),
        essential: bool = False,
        flags: Sequence[str] = (),
        program: Sequence[str] = (),
    ) -> Component:
        return Component(
            name=name,
            argv=(*(program or self.program), *arguments, "--config", str(self.config_file), *flags),
            environ=self.environ,
            log_path=self.run_folder / f"{name}.log",
            stop_stage=stop_stage,
            cpus=cpus,
            essential=essential,
        )


@dataclass(frozen=True, slots=True)
class Seats:
    """Places for workers on this machine: each has CPUs of its own where they can be divided.

    Attributes:
        count: of workers at the same time.
        threads: of an engine's that computes on CPUs and was not told how many; None: all that it finds.
    """

    settings: Settings
    count: int
    commands: Commands
    shares: tuple[tuple[int, ...], ...] | None
    threads: int | None

    @classmethod
    def of(cls, settings: Settings, cpus: Sequence[int], commands: Commands) -> Seats:
        """As many as there are workers; where their number changes, as many as there may be."""
        cluster, computes = settings.cluster, settings.worker.engine == "vllm"
        count = cluster.prefill + cluster.decode
        if cluster.autoscale:
            count = max(count, cluster.max_workers or len(cpus))
        # A simulated engine needs no CPU of its own.
        shares = cores.divide(cores.physical_cores(cpus), count) if computes and settings.device != "cuda" else None
        threads = max(1, len(cpus) // count) if computes and settings.worker.threads is None and count > 1 else None
        return cls(settings, count, commands, tuple(shares) if shares is not None else None, threads)

    def worker(self, name: str, role: Role.ValueType, seat: int) -> Component:
        """A worker to be started in that role, on that seat."""
        share = self.shares[seat] if self.shares is not None else ()
        threads = self.settings.worker.threads
        flags = ["--worker-id", name]
        if self.threads is not None:
            flags += ["--threads", str(len(share) or self.threads)]
        elif threads is not None and threads > len(share):
            share = ()  # more threads were asked for than a share has CPUs: let them have all
        command = "prefill-worker" if role == Role.ROLE_PREFILL else "decode-worker"
        return self.commands.component(name, [command], stop_stage=STAGE_WORKERS, cpus=share, flags=flags)


def seat_name(number: int) -> str:
    """Of a worker whose role may change."""
    return f"worker-{number}"


def _workers(settings: Settings, seats: Seats) -> list[Component]:
    cluster = settings.cluster
    roles = [Role.ROLE_PREFILL] * cluster.prefill + [Role.ROLE_DECODE] * cluster.decode
    names = [f"prefill-{index}" for index in range(cluster.prefill)]
    names += [f"decode-{index}" for index in range(cluster.decode)]
    if cluster.autoscale:
        names = [seat_name(number) for number in range(len(roles))]
    return [seats.worker(name, role, seat) for seat, (name, role) in enumerate(zip(names, roles, strict=True))]


def child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What a child gets of the environment: nothing that Slipstream would read as a setting."""
    child = {name: value for name, value in environ.items() if not name.startswith(ENV_PREFIX)}
    child["PYTHONPATH"] = module_path(environ)
    child["PYTHONUNBUFFERED"] = "1"
    return child


def resolve_ports(settings: Settings) -> Settings:
    """The settings with every port of the public faces and the control plane decided.

    Raises:
        ConfigError: a port is taken.
    """
    face, control = settings.frontend, settings.control_plane
    http_port = _port(face.host, face.http_port, "frontend.http_port", "--http-port")
    grpc_port = _port(face.host, face.grpc_port, "frontend.grpc_port", "--grpc-port", taken={http_port})
    control_port = _port(
        control.host, control.port, "control_plane.port", "--control-plane-port", taken={http_port, grpc_port}
    )
    taken = {http_port, grpc_port, control_port}
    metrics_port = _port(
        control.host, control.metrics_port, "control_plane.metrics_port", "--control-plane-metrics-port", taken=taken
    )
    address = host_port(reachable(control.host), control_port)
    return settings.model_copy(
        update={
            "frontend": face.model_copy(update={"http_port": http_port, "grpc_port": grpc_port}),
            "control_plane": control.model_copy(
                update={"port": control_port, "metrics_port": metrics_port, "address": address}
            ),
            # Each worker gets its own name and ports; one value for all of them would collide.
            "worker": settings.worker.model_copy(update={"worker_id": None, "port": 0, "metrics_port": 0}),
        }
    )


def _port(host: str, port: int, setting: str, flag: str, taken: Collection[int] = ()) -> int:
    """The port itself when it can be listened on, or a free one for 0."""
    if port != 0 and port in taken:
        raise ConfigError(f"{setting} = {port} is used twice; give each face its own port ({flag})", param=setting)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if port == 0:
            return free_port(host, chosen=taken)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
            return port
    except OSError as error:
        message = (
            f"{setting} = {port}: cannot listen on {host}:{port} ({error.strerror}); stop what listens there, "
            f"or choose another port with {flag} (0 takes a free one)"
        )
        raise ConfigError(message, param=setting) from None


def state_folder(environ: Mapping[str, str], home: Path) -> Path:
    """Of this user: XDG_STATE_HOME, else ~/.local/state."""
    state = environ.get("XDG_STATE_HOME") or ""
    # The XDG specification: a relative path is to be ignored.
    return (Path(state) if os.path.isabs(state) else home / ".local" / "state") / "slipstream"
