"""The actor that runs one worker on its node: it starts the process that local mode starts, and watches over it.

Nothing of a request passes through it. It ends when its process has ended, and takes its placement group along, so
that neither is left over whoever has died meanwhile. Whoever runs the pool asks it for its state every second or so;
an actor that has not been asked for long is an orphan: it drains its worker and ends (the reaper of orphans is thus in
each of them, and needs no node of its own).
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.processes import Component, Process, describe_exit, log_tail
from slipstream.child_python import module_path
from slipstream.config_layer import ENV_PREFIX
from slipstream.errors import StartupError
from slipstream.security.authority import write_secret
from slipstream.v1.registry_pb2 import Role

_CHECK_S = 0.5
_TOLD_S = 3.0
"""How long an actor whose worker has ended waits for somebody to hear it."""
_KILL_AFTER_DRAIN_S = 10.0
_LOG_LINES = 20


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker shall be.

    Attributes:
        settings_yaml: all settings, as in a file for `--config`.
        settings_id: equal for workers that were ordered by the same settings.
        run_folder: of its log, on its node.
        threads: of an engine that computes on CPUs; None: as the settings say.
        tokens: of the cluster.
    """

    worker_id: str
    model: str
    role: Role.ValueType
    settings_yaml: str
    settings_id: str
    run_folder: str
    threads: int | None
    drain_timeout_s: float
    orphan_after_s: float
    ordered_unix_s: float
    tokens: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Found:
    """What an actor says of itself.

    Attributes:
        node_id: of the node that it is on.
        asked_by, asked_ago_s: who asked it before, and how long ago.
    """

    order: Order
    node_id: str
    started: bool
    ending: bool
    asked_by: str
    asked_ago_s: float


class WorkerActor:
    """Methods are called by the pool; Ray runs them in one event loop."""

    def __init__(self, order: Order) -> None:
        import ray

        self._order = order
        self._group = ray.util.get_current_placement_group()
        self._node_id: str = ray.get_runtime_context().get_node_id()
        self._heard_s = time.monotonic()
        self._asked_by = ""
        self._process: Process | None = None
        self._ending = False
        self._ended = asyncio.Event()
        self._how = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finishing: asyncio.Task[None] | None = None
        threading.Thread(target=self._watch, name="orphan-watch", daemon=True).start()

    async def start(self) -> None:
        """Start the worker; again: nothing.

        Raises:
            StartupError: it cannot be started on this node.
        """
        self._heard()
        if self._process is None and not self._how:
            try:
                self._process = Process.spawn(self._component())
            except OSError as error:
                message = f"the run folder {self._order.run_folder} cannot be written on {_host()}: {error.strerror}"
                raise StartupError(message) from None
            self._finishing = asyncio.create_task(self._finish(self._process))

    async def describe(self, asker: str = "") -> Found:
        """What this is. Being asked by a pool keeps it from being an orphan; others only look."""
        ago_s = time.monotonic() - self._heard_s
        found = Found(self._order, self._node_id, self._process is not None, self._ending, self._asked_by, ago_s)
        if asker:
            self._asked_by = asker
            self._heard()
        return found

    async def drain(self) -> None:
        """Ask the worker to finish what it has and end; returns at once."""
        self._heard()
        self._drain()

    async def ended(self) -> str:
        """Wait until the worker has ended, and say how, with the end of its log."""
        await self._ended.wait()
        return self._how

    def _heard(self) -> None:
        self._heard_s = time.monotonic()
        self._loop = asyncio.get_running_loop()

    def _drain(self) -> None:
        if self._ending:
            return
        self._ending = True
        if self._process is None:
            self._leave()
            return
        self._process.ask_to_end()
        asyncio.get_running_loop().call_later(self._order.drain_timeout_s + _KILL_AFTER_DRAIN_S, self._process.kill)

    async def _finish(self, process: Process) -> None:
        how = describe_exit(await process.wait())
        tail = "" if self._ending else log_tail(self._log_path, _LOG_LINES)
        self._how = f"{how}; the end of {self._log_path} on {_host()}:\n{tail}" if tail else how
        self._ended.set()
        await asyncio.sleep(_TOLD_S)
        self._leave()

    def _watch(self) -> None:
        """In a thread of its own: it must work although nobody has ever called."""
        while time.monotonic() - self._heard_s < self._order.orphan_after_s:
            time.sleep(_CHECK_S)
        if self._loop is None:
            self._leave()
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _leave(self) -> None:
        """The end of the placement group, and so of this actor."""
        import ray

        try:
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        finally:  # Ray's head may be gone: whoever runs the pool removes groups that have no actor
            os._exit(0)

    @property
    def _log_path(self) -> Path:
        return Path(self._order.run_folder) / f"{self._order.worker_id}.log"

    def _component(self) -> Component:
        order, folder = self._order, Path(self._order.run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f"{order.worker_id}.yaml"
        config.write_text(order.settings_yaml, encoding="utf-8")
        command = "prefill-worker" if order.role == Role.ROLE_PREFILL else "decode-worker"
        argv = [sys.executable, "-P", "-m", "slipstream", command, "--config", str(config)]
        argv += ["--worker-id", order.worker_id, "--host", _host()]
        argv += ["--node", self._node_id]
        if order.threads is not None:
            argv += ["--threads", str(order.threads)]
        if order.tokens:
            tokens = folder / f"{order.worker_id}.token"
            write_secret(tokens, "".join(f"{token}\n" for token in order.tokens))
            argv += ["--cluster-token-file", str(tokens)]
        return Component(
            name=order.worker_id, argv=tuple(argv), environ=_child_environ(os.environ), log_path=self._log_path
        )


def _child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what Ray sets for Python code of its own: its one OpenMP thread would be the engine's."""
    child = {name: value for name, value in environ.items() if not name.startswith((ENV_PREFIX, "RAY_"))}
    child.pop("OMP_NUM_THREADS", None)
    child["PYTHONPATH"] = module_path(environ)
    child["PYTHONUNBUFFERED"] = "1"
    return child


def _host() -> str:
    """This node's address, as others reach it."""
    import ray

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
