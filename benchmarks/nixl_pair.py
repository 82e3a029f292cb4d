"""The rival that does what Slipstream does: two vLLM servers with NixlConnector, prefill and decode, and a proxy.

Each engine gets the CPUs that `slipstream up` would give to a worker. On CPU the connector then moves the engine's
thread to the last core of its NUMA node, whatever it was given, so both engines compute on the same core. That can be
left as it is, or undone once both are ready.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import affinity
from benchmarks.affinity import BusyThread
from benchmarks.cluster_server import WorkerFacts
from benchmarks.server import Server, child_environ, running
from benchmarks.vllm_server import Flavour, until_healthy, vllm_server
from deploy import cores
from deploy.processes import Component
from slipstream.errors import StartupError
from slipstream.free_ports import free_port

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_LOOPBACK = "127.0.0.1"
_BUSIEST = 4


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one engine's threads may run, as the kernel says.

    Attributes:
        cpus_given: at its start.
        threads_when_ready: how many threads may use which CPUs once it was ready, and nothing was corrected yet.
        threads_when_measured: the same after the last load.
        busiest_threads: since its start.
    """

    engine: str
    cpus_given: str
    threads_when_ready: dict[str, int]
    threads_when_measured: dict[str, int]
    busiest_threads: list[BusyThread]


class Placements:
    """The two engines' threads, looked at when they are ready and after they were measured."""

    def __init__(self, shares: Mapping[str, tuple[int, ...]], pids: Mapping[str, int]) -> None:
        self._shares, self._pids = shares, pids
        self._when_ready = {name: affinity.threads_by_cpus(pid) for name, pid in pids.items()}

    def correct(self) -> None:
        """Every thread back to the CPUs that its engine was given.

        Raises:
            StartupError: the kernel says otherwise.
        """
        for name, pid in self._pids.items():
            affinity.confine(pid, self._shares[name])
            found = affinity.threads_by_cpus(pid)
            if set(found) != {affinity.span(self._shares[name])}:
                raise StartupError(f"{name}: its threads were to stay on CPUs {self._shares[name]} but run on {found}")

    def look(self) -> list[Placement]:
        """As it is now."""
        return [
            Placement(
                engine=name,
                cpus_given=affinity.span(self._shares[name]),
                threads_when_ready=self._when_ready[name],
                threads_when_measured=affinity.threads_by_cpus(pid),
                busiest_threads=affinity.busiest_threads(pid, _BUSIEST),
            )
            for name, pid in self._pids.items()
        ]


@asynccontextmanager
async def nixl_pair(
    name: str, model_folder: Path, folder: Path, facts: WorkerFacts, *, dtype: str, correct: bool
) -> AsyncIterator[tuple[Server, Placements]]:
    """The pair and its proxy while the block runs; their logs go into `folder`.

    Args:
        correct: undo what the connector does to the engines' CPU affinity.

    Raises:
        StartupError: one of them did not become ready, or there are not two CPUs.
    """
    began_s = time.monotonic()
    shares = _shares()
    async with AsyncExitStack() as stack:
        engines: dict[str, Server] = {}
        for role, share in shares.items():
            flavour = Flavour(cpus=share, flags=connector_flags(), environ=_side_channel())
            entered = vllm_server(f"{name}-{role}", model_folder, folder, facts, dtype=dtype, flavour=flavour)
            engines[role] = await stack.enter_async_context(entered)
        placements = Placements(shares, {role: engine.pid for role, engine in engines.items()})
        if correct:
            placements.correct()
        url = f"http://{_LOOPBACK}:{free_port()}"
        proxy = _proxy(f"{name}-proxy", url, engines["prefill"].url, engines["decode"].url, folder)
        process = await stack.enter_async_context(
            running(proxy, lambda: until_healthy(url), start_timeout_s=_START_TIMEOUT_S, stop_timeout_s=_STOP_TIMEOUT_S)
        )
        server = Server(
            name=name,
            url=url,
            model=engines["decode"].model,
            pid=process.pid,
            has_account=False,
            start_s=time.monotonic() - began_s,
            more_pids=tuple(engine.pid for engine in engines.values()),
        )
        yield server, placements


def connector_flags() -> tuple[str, ...]:
    """What makes a vLLM server one of the pair. Either could do either's part: the proxy says which does what."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    return "--kv-transfer-config", json.dumps(transfer)


def _shares() -> dict[str, tuple[int, ...]]:
    divided = cores.divide(cores.physical_cores(os.sched_getaffinity(0)), 2)
    if divided is None:
        raise StartupError("a prefill and a decode engine with a core each need two CPUs")
    return dict(zip(("prefill", "decode"), divided, strict=True))


def _side_channel() -> dict[str, str]:
    return {"VLLM_NIXL_SIDE_CHANNEL_HOST": _LOOPBACK, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}


def _proxy(name: str, url: str, prefill_url: str, decode_url: str, folder: Path) -> Component:
    port = url.rpartition(":")[2]
    servers = ("--prefill", prefill_url, "--decode", decode_url)
    return Component(
        name=name,
        argv=(sys.executable, "-P", "-m", "benchmarks.nixl_proxy", "--port", port, *servers),
        environ=child_environ(os.environ),
        log_path=folder / f"{name}.log",
    )
