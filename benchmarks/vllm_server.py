"""One aggregated vLLM engine behind vLLM's own OpenAI server: what Slipstream is compared with.

It gets what the cluster has: the same model, number format, context, KV memory of one worker, eager mode on CPU, and
the processes laid out in the way that leaves most of the CPU to the model; its engine computes on all cores.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from benchmarks.cluster_server import WorkerFacts
from benchmarks.server import Server, child_environ, running
from deploy.processes import Component

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.25
_PROBE_TIMEOUT_S = 3.0
_MODEL_NAME = "aggregated"


@asynccontextmanager
async def aggregated(
    name: str, model_folder: Path, folder: Path, facts: WorkerFacts, *, dtype: str, step_tokens: int | None
) -> AsyncIterator[Server]:
    """The server while the block runs; its log goes into `folder`.

    Args:
        step_tokens: tokens computed in one engine step; None leaves it to vLLM.

    Raises:
        StartupError: it did not become ready.
    """
    began_s = time.monotonic()
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    component = Component(
        name=name,
        argv=(
            *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)),
            *arguments(model_folder, facts, dtype=dtype, step_tokens=step_tokens),
        ),
        environ=_environ(os.environ, on_cpu=facts.device == "cpu", threads=len(os.sched_getaffinity(0))),
        log_path=folder / f"{name}.log",
    )
    async with running(
        component, lambda: _until_healthy(url), start_timeout_s=_START_TIMEOUT_S, stop_timeout_s=_STOP_TIMEOUT_S
    ) as process:
        yield Server(name, url, _MODEL_NAME, process.pid, has_account=False, start_s=time.monotonic() - began_s)


def arguments(model_folder: Path, facts: WorkerFacts, *, dtype: str, step_tokens: int | None) -> tuple[str, ...]:
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
    if step_tokens is not None:
        values["--max-num-batched-tokens"] = step_tokens
    switches = ("--disable-uvicorn-access-log", *(("--enforce-eager",) if facts.device == "cpu" else ()))
    return (*(str(part) for pair in values.items() for part in pair), *switches)


def _environ(environ: Mapping[str, str], *, on_cpu: bool, threads: int) -> dict[str, str]:
    child = child_environ(environ)
    child |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    if on_cpu:
        child |= {
            "TORCHDYNAMO_DISABLE": "1",
            # No third process whose reader spins on a core; and all cores to the engine, where vLLM's own choice
            # keeps one back. Both make the aggregated engine faster.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(threads),
        }
    return child


async def _until_healthy(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=_PROBE_TIMEOUT_S, trust_env=False) as http:
        while True:
            try:
                if (await http.get("/health")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # not listening yet
            await asyncio.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        chosen: int = probe.getsockname()[1]
        return chosen
