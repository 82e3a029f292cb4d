"""Which profile a simulated worker keeps time by: the one that is set, or the packaged one, within the settings."""

from __future__ import annotations

from pathlib import Path

import msgspec

from slipstream.errors import ConfigError
from slipstream.performance import Profile, read_profile
from slipstream.worker_settings import WorkerSettings

PACKAGED = Path(__file__).with_name("profiles")
DEFAULT = "smollm2-cpu"


def profile_of(worker: WorkerSettings) -> Profile:
    """The profile at `worker.profile`, or the packaged default, with what the settings say of sizes.

    `worker.profile` may be the name of a packaged profile. `worker.max_running` and `worker.max_model_len` are upper
    limits; `worker.block_tokens`, `max_batched_tokens` and `kv_cache_bytes` replace the profile's.

    Raises:
        ConfigError: it cannot be read, or the sizes do not fit together.
    """
    profile = read_profile(profile_path(worker.profile))
    token_bytes = profile.block_bytes / profile.block_tokens
    block_tokens = worker.block_tokens or profile.block_tokens
    block_bytes = max(1, round(token_bytes * block_tokens))
    kv_bytes = worker.kv_cache_bytes or profile.blocks * profile.block_bytes
    blocks = kv_bytes // block_bytes
    max_model_len = min(profile.max_model_len, worker.max_model_len or profile.max_model_len)
    if blocks * block_tokens < max_model_len:
        raise ConfigError(
            f"worker.kv_cache_bytes: {kv_bytes} is room for {blocks * block_tokens} tokens, the longest context has "
            f"{max_model_len}; raise it, or lower worker.max_model_len",
            param="worker.kv_cache_bytes",
        )
    return msgspec.structs.replace(
        profile,
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        blocks=blocks,
        max_model_len=max_model_len,
        max_running=min(profile.max_running, worker.max_running),
        step_tokens=worker.max_batched_tokens or profile.step_tokens,
    )


def profile_path(asked: Path | None) -> Path:
    """Where the profile is that is asked for by path, or by the name of a packaged one."""
    packaged = PACKAGED / f"{asked or DEFAULT}.json"
    if asked is None or (asked.parent == Path(".") and not asked.exists() and packaged.exists()):
        return packaged
    return asked.expanduser()
