"""What is left to Python's collector of cycles: objects that point at each other, and that nobody else has."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_OURS = ("frontend.", "slipstream.")


@contextmanager
def left_to_the_collector() -> Iterator[Counter[str]]:
    """Counts, by type or function, what of ours became garbage in cycles while the block ran; filled at its end."""
    found = Counter[str]()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(name for name in map(_name, gc.garbage) if name.startswith(_OURS))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _name(one: object) -> str:
    named = one if hasattr(one, "__qualname__") else type(one)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"
