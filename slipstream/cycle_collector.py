"""When Python looks for objects that keep each other, in processes that serve: not among all that they have imported.

Nothing else goes on while it looks, and a full look at a worker's service, with torch and vLLM, takes 0.4 s.
"""

from __future__ import annotations

import gc

# Net allocations between two looks at the youngest objects, and how many looks between two at the older ones.
_AFTER_OBJECTS = 50_000
_OLDER_EVERY = (20, 20)


def leave_out_what_is_there() -> None:
    """What was loaded by now stays, and need not be looked at again; nor for the few that are garbage already, since
    that takes as long. To be called before the first request."""
    gc.freeze()


def look_seldom() -> None:
    """That, and long pauses between two looks, where requests leave nothing in cycles: looking took a tenth of the
    frontend's CPU time."""
    gc.collect()
    leave_out_what_is_there()
    gc.set_threshold(_AFTER_OBJECTS, *_OLDER_EVERY)
