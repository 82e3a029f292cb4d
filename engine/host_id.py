"""Which host this is, in the sense that matters for shared memory."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def read() -> str:
    """Equal for processes that can reach each other's memory: one boot, one PID namespace, one /dev/shm."""
    facts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    facts.append(str(Path("/proc/self/ns/pid").readlink()))
    shm = Path("/dev/shm")
    facts.append(str(shm.stat().st_dev) if shm.is_dir() else "")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
