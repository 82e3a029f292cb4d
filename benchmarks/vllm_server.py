"""A vLLM engine behind vLLM's own OpenAI server: what Slipstream is compared with.

It gets what the cluster has: the same model, number format, context, KV memory of one worker, eager mode on CPU, and
the processes laid out in the way that leaves most of the CPU to the model. An aggregated engine computes on all cores.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.cluster_server import WorkerFacts
from benchmarks.server import Server, child_environ, running
from deploy.processes import Component
from slipstream.free_ports import free_port

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.25
_PROBE_TIMEOUT_S = 3.0
_MODEL_NAME = "model"


@dataclass(frozen=True, slots=True)
class Flavour:
    """What one of these servers has that another has not.

    Attributes:
        step_tokens: tokens computed in one engine step; None leaves it to vLLM.
        cpus: the CPUs it may use; empty for all.
        flags: further ones of vLLM's.
        environ: variables on top, or instead, of this process's own.
    """

    step_tokens: int | None = None
    cpus: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


@asynccontextmanager
async def aggregated(
    name: str, model_folder: Path, folder: Path, facts: WorkerFacts, *, dtype: str, step_tokens: int | None
) -> AsyncIterator[Server]:
    """One engine on all cores, while the block runs; see `vllm_server`."""
    async with vllm_server(name, model_folder, folder, facts, dtype=dtype, flavour=Flavour(step_tokens)) as server:
        yield server


@asynccontextmanager
async def vllm_server(
    name: str, model_folder: Path, folder: Path, facts: WorkerFacts, *, dtype: str, flavour: Flavour
) -> AsyncIterator[Server]:
    """The server while the block runs; its log goes into `folder`.

    Raises:
        StartupError: it did not become ready.
    """
    began_s = time.monotonic()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    threads = len(flavour.cpus or os.sched_getaffinity(0))
    component = Component(
        name=name,
        argv=(
            *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)),
            *arguments(model_folder, facts, dtype=dtype, flavour=flavour),
        ),
        environ=_environ({**os.environ, **flavour.environ}, on_cpu=facts.device == "cpu", threads=threads),
        log_path=folder / f"{name}.log",
        cpus=flavour.cpus,
    )
    async with running(
        component, lambda: until_healthy(url), start_timeout_s=_START_TIMEOUT_S, stop_timeout_s=_STOP_TIMEOUT_S
    ) as process:
        yield Server(name, url, _MODEL_NAME, process.pid, has_account=False, start_s=time.monotonic() - began_s)


def arguments(model_folder: Path, facts: WorkerFacts, *, dtype: str, flavour: Flavour) -> tuple[str, ...]:
    """vLLM's flags, without the port."""
    values = {
        "--model": model_folder,
        "--served-model-name": _MODEL_NAME,
        "--host": "127.0.0.1",
        "--dtype": dtype,
        "--max-model-len": facts.max_model_len,
        "--kv-cache-memory-bytes": facts.kv_cache_bytes,
        "--block-size": facts.block_tokens,
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
    }
    if flavour.step_tokens is not None:
        values["--max-num-batched-tokens"] = flavour.step_tokens
    switches = ("--disable-uvicorn-access-log", *(("--enforce-eager",) if facts.device == "cpu" else ()))
    return (*(str(part) for pair in values.items() for part in pair), *switches, *flavour.flags)


def _environ(environ: Mapping[str, str], *, on_cpu: bool, threads: int) -> dict[str, str]:
    child = child_environ(environ)
    child |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    if on_cpu:
        child |= {
            "TORCHDYNAMO_DISABLE": "1",
            # No third process whose reader spins on a core; and all its cores to the engine, where vLLM's own choice
            # keeps one back. Both make the engine faster.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(threads),
        }
    return child


async def until_healthy(url: str) -> None:
    """Waits, without a limit of its own, until GET /health is answered with 200."""
    async with httpx.AsyncClient(base_url=url, timeout=_PROBE_TIMEOUT_S, trust_env=False) as http:
        while True:
            try:
                if (await http.get("/health")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # not listening yet
            await asyncio.sleep(_POLL_S)
