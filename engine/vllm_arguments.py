"""What vLLM is told of an engine: the same on all nodes of a worker, but for which of them it is."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs
from vllm.config import KVTransferConfig
from vllm.config.kv_events import KVEventsConfig
from vllm.exceptions import VLLMError
from vllm.transformers_utils.config import get_config

from engine import device as devices
from engine import host_id
from engine.device import Device
from engine.node_group import NodeGroup
from engine.vllm_events import EventSocket
from kv_transfer.board import Board
from slipstream.errors import ConfigError, StartupError
from slipstream.settings import Settings
from slipstream.worker_settings import WorkerSettings

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


def engine_args(
    settings: Settings,
    device: Device,
    *,
    model_path: Path,
    served_name: str,
    board: Board,
    owner_key: bytes,
    events: EventSocket | None = None,
) -> AsyncEngineArgs:
    """The arguments of an engine, or of this node's part of one.

    Args:
        board: of this worker on this node.
        owner_key: by which transfer agents know the service that they obey.
        events: where the engine says what its prefix cache has.

    Raises:
        StartupError: vLLM cannot read the model's configuration. ConfigError: settings do not fit it.
    """
    try:
        return _engine_args(settings, device, model_path, served_name, _connector(settings, board, owner_key), events)
    except (VLLMError, ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise StartupError(f"vLLM cannot use the configuration in {model_path}: {error}") from error


def _engine_args(
    settings: Settings,
    device: Device,
    model_path: Path,
    served_name: str,
    connector: Mapping[str, Any],
    events: EventSocket | None,
) -> AsyncEngineArgs:
    worker = settings.worker
    dtype = devices.choose_dtype(settings.dtype, device, devices.cpu_flags())
    hf_config = get_config(str(model_path), trust_remote_code=False).get_text_config()
    context = int(getattr(hf_config, "max_position_embeddings", 0) or 4096)
    if worker.max_model_len is not None:
        context = min(context, worker.max_model_len)
    ranks = worker.tensor_parallel_size
    kv_bytes = devices.choose_kv_bytes(
        worker.kv_cache_bytes,
        devices.kv_token_bytes(hf_config, _DTYPE_BYTES[dtype], ranks),
        context,
        devices.memory_bytes(device, ranks),
    )
    optional: dict[str, Any] = _parallel(worker)
    if worker.block_tokens is not None:
        optional["block_size"] = worker.block_tokens
    step_tokens = devices.choose_step_tokens(worker.max_batched_tokens, worker.max_running, device)
    if step_tokens is not None:
        optional["max_num_batched_tokens"] = step_tokens
    if worker.load_format == "runai_streamer":
        optional |= _streamed(worker)
    if events is not None:
        optional["kv_events_config"] = KVEventsConfig(
            enable_kv_cache_events=True,
            endpoint=events.endpoint,
            replay_endpoint=events.replay_endpoint,
        )
    return AsyncEngineArgs(
        model=str(model_path),
        served_model_name=served_name,
        dtype=dtype,
        skip_tokenizer_init=True,  # tokens in, tokens out
        max_model_len=context,
        kv_cache_memory_bytes=kv_bytes // ranks,
        max_num_seqs=worker.max_running,
        # Compiling costs a CPU worker more start-up time than it gains; a GPU captures graphs.
        enforce_eager=device == "cpu",
        enable_prefix_caching=True,
        worker_cls="engine.timed_worker.TimedWorker",
        generation_config="vllm",  # sampling defaults are the API's, the same whatever the model's files say
        disable_log_stats=False,  # the queue lengths come with them
        kv_transfer_config=KVTransferConfig(
            kv_connector="SlipstreamConnector",
            kv_connector_module_path="kv_transfer.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=dict(connector),
        ),
        **optional,
    )


def _connector(settings: Settings, board: Board, owner_key: bytes) -> dict[str, Any]:
    """See `kv_transfer.connector`."""
    return {
        "board": str(board.path),
        "owner_pid": os.getpid(),
        "owner_key": owner_key.hex(),
        "host_id": host_id.read(),
        "host": settings.transfer.host or settings.worker.host,
        "transfer": settings.transfer.model_dump(),
    }


def _parallel(worker: WorkerSettings) -> dict[str, Any]:
    group = NodeGroup.of(worker)
    if worker.tensor_parallel_size == 1:
        return {}
    parallel = {"tensor_parallel_size": worker.tensor_parallel_size, "distributed_executor_backend": "mp"}
    if not group.several:
        return parallel
    return parallel | {
        "nnodes": group.nodes,
        "node_rank": group.rank,
        "master_addr": group.leader,
        "master_port": group.port,
        # vLLM takes a rank for one of this node when its number fits the devices that are seen: all those of the
        # machine on a node with more GPUs than ranks, a single one on CPUs.
        "device_ids": list(range(group.local_ranks)),
    }


def _streamed(worker: WorkerSettings) -> dict[str, Any]:
    """The arguments by which vLLM streams weights.

    Raises:
        ConfigError: the streamer is not installed.
    """
    if importlib.util.find_spec("runai_model_streamer") is None:
        raise ConfigError(
            "worker.load_format = runai_streamer: it is not installed here; install slipstream's extra `streamer`",
            param="worker.load_format",
        )
    memory = -1 if worker.stream_memory_bytes is None else worker.stream_memory_bytes
    return {
        "load_format": "runai_streamer",
        "use_tqdm_on_load": False,
        "model_loader_extra_config": {"concurrency": worker.stream_readers, "memory_limit": memory},
    }
