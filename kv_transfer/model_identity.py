"""Which weights a worker has loaded, told apart without reading them all.

Two fine-tunes of one model have the same shapes, and may be served under the same name; their KV blocks must not be
exchanged. Weight files are sampled: their names, sizes and some pages of each, spread evenly, which differ between any
two trainings.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_PAGES = 32
_PAGE_BYTES = 4096


def weights_digest(model: Path) -> str:
    """A digest of the weight files in a model's folder; empty where there is no such folder."""
    if not model.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _WEIGHTS for file in model.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as weights:
            for page in range(_PAGES):
                weights.seek(page * max(0, size - _PAGE_BYTES) // (_PAGES - 1))
                digest.update(weights.read(_PAGE_BYTES))
    return digest.hexdigest()
