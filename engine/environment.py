"""What must be set in a worker's process before torch and vLLM are imported.

vLLM and OpenMP read these variables when they are imported, so this is the one place that writes the
environment, at the very start of a worker, and nothing in Slipstream reads them back.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from importlib import metadata
from pathlib import Path

from engine.node_group import NodeGroup, network_variables
from slipstream.settings import Settings

_LOGGING = Path(__file__).with_name("vllm_logging.json")


def prepare(settings: Settings, environ: MutableMapping[str, str]) -> None:
    """Set what a worker's engine process needs; values that the user has set are kept, but for one that is unsafe.

    Raises:
        ConfigError: what is said of the worker's nodes cannot be.
    """
    worker = settings.worker
    group = NodeGroup.of(worker)
    defaults = {
        # Two processes a worker (service and engine) instead of three, and no spinning shared-memory reader.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "DEBUG" if settings.log.level == "debug" else "WARNING",
        # Warnings, but not one for each of a model's weights when it is loaded in another number format.
        **({} if settings.log.level == "debug" else {"VLLM_LOGGING_CONFIG_PATH": str(_LOGGING)}),
        # A serving cluster does not report home.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Eager on CPU. vLLM compiles a few helpers (log probabilities among them) on first use even then, which
        # takes 16 s of silence in the middle of a request.
        **({"TORCHDYNAMO_DISABLE": "1"} if _is_cpu_build() else {}),
    }
    if group.several:
        defaults |= network_variables(worker.host)
    if worker.tensor_parallel_size > 1 and _is_cpu_build():
        defaults |= rank_threads(group.local_ranks, worker.threads, sorted(os.sched_getaffinity(0)))
    elif worker.threads is not None:
        defaults["OMP_NUM_THREADS"] = str(worker.threads)
    for name, value in defaults.items():
        environ.setdefault(name, value)
    # Whatever was set: with it vLLM unpickles what comes out of the sockets between service and engine.
    environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "0"


def rank_threads(ranks: int, threads: int | None, cpus: Sequence[int]) -> dict[str, str]:
    """Where the threads of each rank of this node run. Ranks wait for each other in every layer: what slows one down
    slows all, so each has CPUs of its own as far as there are any.

    Args:
        threads: of all these ranks together; all of `cpus` when None.
    """
    each = max(1, min(len(cpus), threads or len(cpus)) // ranks)
    if len(cpus) < ranks or (threads is not None and threads > len(cpus)):
        # vLLM's own choice wants a NUMA node for each rank.
        return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, (threads or 1) // ranks))}
    shares = [cpus[rank * len(cpus) // ranks :][:each] for rank in range(ranks)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, share)) for share in shares)}


def _is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU distribution; asked without importing it."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True
