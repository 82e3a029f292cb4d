"""The two frontends that are compared, each with four workers that take no time, in one process of their own.

Slipstream's gets `benchmarks.instant_worker`; NVIDIA Dynamo's gets its own mocker. Neither needs a GPU, and Dynamo
runs without etcd and NATS: it finds its workers by files.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.instant_worker import FIRST_TOKEN
from benchmarks.server import child_environ, running, tree_cpu_s
from deploy.processes import Component
from slipstream.config_layer import ENV_PREFIX
from slipstream.errors import StartupError
from slipstream.free_ports import free_port
from slipstream.security.identity import face_files_of
from slipstream.security_settings import SecuritySettings

WORKERS = 4
MODEL_NAME = "smol"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.1
_PROBE_TIMEOUT_S = 3.0

DYNAMO_VERSION = "1.6.1"
_DYNAMO_OWN = (f"ai-dynamo=={DYNAMO_VERSION}", f"ai-dynamo-runtime=={DYNAMO_VERSION}")
# What its frontend and its mocker import. Its declared dependencies ask for much more, engines among it.
_DYNAMO_NEEDS = (
    *("aiohttp", "kubernetes<33", "msgspec", "pyzmq", "redis", "transformers", "zstandard"),
    *("uvloop", "setproctitle", "fastapi", "uvicorn"),
)
_INSTALL_TIMEOUT_S = 600.0
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class MeasuredFrontend:
    """A running frontend.

    Attributes:
        pid: of the process whose CPU time counts, with all that it has started.
        workers_pid: of the process of the workers behind it; 0 where nobody asks what they take.
    """

    name: str
    port: int
    pid: int
    workers_pid: int = 0

    def cpu_s(self) -> float:
        """Used until now."""
        return tree_cpu_s(self.pid)


@asynccontextmanager
async def slipstream_frontend(
    model: Path,
    folder: Path,
    *,
    step_s: float,
    processes: int = 1,
    first_token: int = FIRST_TOKEN,
    queue: int | None = None,
    peer_key_sha256: str | None = None,
    security: SecuritySettings | None = None,
) -> AsyncIterator[MeasuredFrontend]:
    """Our frontend with a real control plane and workers that take `step_s` a token.

    Args:
        queue: requests that may come at the same time, none of which is to be refused; None leaves the defaults.
        peer_key_sha256: of the key of a global frontend that may use it.
        security: of all its processes; by default there is none.

    Raises:
        StartupError: it did not become ready.
    """
    http_port, grpc_port, registry_port = free_port(), free_port(), free_port()
    registry = f"127.0.0.1:{registry_port}"
    program = (sys.executable, "-P", "-m", "slipstream")
    common = ("--model", str(model), "--served-model-name", MODEL_NAME, "--control-plane", registry)
    frontend_flags = ["--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    frontend_flags += ["--workers", str(processes)] if processes > 1 else []
    admission: dict[str, object] = {}
    if queue is not None:
        admission |= {"realtime_queue": queue, "queue": queue, "worker_wait_s": _LONGEST_WAIT_S}
    if peer_key_sha256 is not None:
        admission["peer_key_sha256"] = peer_key_sha256
    if admission:
        file = folder / "frontend.yaml"
        file.write_text(json.dumps({"admission": admission}))
        frontend_flags += ["--config", str(file)]
    security = security or SecuritySettings()
    secured = child_environ(os.environ) | _environ_of(security)
    workers = (*(sys.executable, "-P", "-m", "benchmarks.instant_worker"), registry, MODEL_NAME)
    async with AsyncExitStack() as stack:

        async def start(name: str, argv: Sequence[str], ready: Callable[[], Awaitable[None]]) -> int:
            component = Component(name, tuple(argv), secured, folder / f"{name}.log")
            limits = {"start_timeout_s": _START_TIMEOUT_S, "stop_timeout_s": _STOP_TIMEOUT_S}
            return (await stack.enter_async_context(running(component, ready, **limits))).pid

        await start("control-plane", (*program, "planner", "serve", "--port", str(registry_port)), _at_once)
        as_workers = (str(WORKERS), str(step_s), str(first_token), security.model_dump_json())
        workers_pid = await start("workers", (*workers, *as_workers), _at_once)
        scheme = "http" if face_files_of(security) is None else "https"
        ready = _until_ok(f"{scheme}://127.0.0.1:{http_port}/health/ready")
        pid = await start("frontend", (*program, "frontend", *common, *frontend_flags), ready)
        yield MeasuredFrontend("slipstream", http_port, pid, workers_pid)


def _environ_of(security: SecuritySettings) -> dict[str, str]:
    """Settings that are files, as processes find them in their environment."""
    chosen = security.model_dump(exclude_defaults=True, mode="json")
    return {f"{ENV_PREFIX}SECURITY__{name.upper()}": str(value) for name, value in chosen.items()}


@asynccontextmanager
async def global_frontend(
    clusters: Mapping[str, MeasuredFrontend], key: str, folder: Path
) -> AsyncIterator[MeasuredFrontend]:
    """A global frontend before these clusters.

    Raises:
        StartupError: it did not become ready.
    """
    port, file = free_port(), folder / "peers.yaml"
    peers = [
        {"name": name, "http": [f"http://127.0.0.1:{one.port}"], "key": key, "max_in_flight": 1 << 20}
        for name, one in clusters.items()
    ]
    faces = {"http_port": port, "grpc_port": free_port()}
    file.write_text(json.dumps({"frontend": faces, "global_frontend": {"clusters": peers}}))
    argv = (sys.executable, "-P", "-m", "slipstream", "global-frontend", "--config", str(file))
    component = Component("global-frontend", argv, child_environ(os.environ), folder / "global-frontend.log")
    ready = _until_ok(f"http://127.0.0.1:{port}/health/ready")
    limits = {"start_timeout_s": _START_TIMEOUT_S, "stop_timeout_s": _STOP_TIMEOUT_S}
    async with running(component, ready, **limits) as process:
        yield MeasuredFrontend("global", port, process.pid)


@asynccontextmanager
async def dynamo_frontend(
    python: Path, model: Path, folder: Path, *, speedup: float
) -> AsyncIterator[MeasuredFrontend]:
    """Dynamo's frontend with its KV router, and its mocker.

    Args:
        python: of the environment that `dynamo_python` made.
        speedup: of the mocker over the engine it mocks; 0 is as fast as possible.

    Raises:
        StartupError: it did not become ready.
    """
    port = free_port()
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"DYN_DISCOVERY_BACKEND": "file", "DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "zmq"}
    environ |= {"DYN_FILE_KV": str(folder / "dynamo-discovery"), "HF_HUB_OFFLINE": "1", "DYN_SYSTEM_PORT": "-1"}
    mocker = ["-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL_NAME]
    mocker += ["--speedup-ratio", f"{speedup:g}", "--num-workers", str(WORKERS)]
    async with AsyncExitStack() as stack:

        async def start(name: str, argv: Sequence[str], ready: Callable[[], Awaitable[None]]) -> int:
            component = Component(name, (str(python), *argv), environ, folder / f"{name}.log")
            limits = {"start_timeout_s": _START_TIMEOUT_S, "stop_timeout_s": _STOP_TIMEOUT_S}
            return (await stack.enter_async_context(running(component, ready, **limits))).pid

        await start("dynamo-mocker", mocker, _at_once)
        frontend = ("-m", "dynamo.frontend", "--http-port", str(port), "--router-mode", "kv")
        pid = await start("dynamo-frontend", frontend, _until_listed(f"http://127.0.0.1:{port}/v1/models"))
        yield MeasuredFrontend("dynamo", port, pid)


async def dynamo_python(cache: Path) -> Path:
    """The Python of an environment with Dynamo in it, made below `cache` when it is not there.

    Raises:
        StartupError: it cannot be installed here; the message says why.
    """
    folder = cache / f"dynamo-{DYNAMO_VERSION}"
    python, done = folder / "bin" / "python", folder / ".complete"
    if done.exists():
        return python
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    for argv in (
        (sys.executable, "-m", "venv", "--clear", str(folder)),
        (*pip, "--no-deps", *_DYNAMO_OWN),
        (*pip, *_DYNAMO_NEEDS),
    ):
        await _installed(argv)
    done.touch()
    return python


async def _installed(argv: Sequence[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(_INSTALL_TIMEOUT_S):
            _out, said = await process.communicate()
    except TimeoutError as error:
        raise StartupError(f"`{' '.join(argv)}` took longer than {_INSTALL_TIMEOUT_S:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise StartupError(f"`{' '.join(argv)}` failed:\n{said.decode(errors='replace')[-2000:]}")


async def _at_once() -> None:
    """For processes that others wait for."""


def _until_ok(url: str) -> Callable[[], Awaitable[None]]:
    return _poll(url, lambda response: response.status_code == 200)


def _until_listed(url: str) -> Callable[[], Awaitable[None]]:
    return _poll(url, lambda response: response.status_code == 200 and MODEL_NAME in response.text)


def _poll(url: str, enough: Callable[[httpx.Response], bool]) -> Callable[[], Awaitable[None]]:
    async def until() -> None:
        # Whoever answers on this port was started here: whether its certificate is good is not the question.
        async with httpx.AsyncClient(timeout=_PROBE_TIMEOUT_S, trust_env=False, verify=False) as http:
            while True:
                try:
                    if enough(await http.get(url)):
                        return
                except httpx.HTTPError:
                    pass  # not listening yet
                await asyncio.sleep(_POLL_S)

    return until
