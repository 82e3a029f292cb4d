"""Names of requests: a client's own where it is harmless, and always one that no other request has."""

from __future__ import annotations

import re
from uuid import uuid4

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def unique_request_id(wanted: str) -> str:
    """An id no other request has. A client's own may come twice, and workers tell requests apart by it."""
    made = uuid4().hex
    return f"{wanted}-{made[:8]}" if wanted else made


def safe_request_id(wanted: str | None) -> str:
    """A client's id if it may go into logs and headers, else nothing."""
    return wanted if wanted and _SAFE_ID.fullmatch(wanted) else ""
