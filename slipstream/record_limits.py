"""How large a worker's record may be. In one place because both ends must agree: a worker whose record the registry
refuses is a worker that nobody finds, so it cuts what it says of its paths to what fits.
"""

from __future__ import annotations

MAX_RECORD_BYTES = 32768
MAX_PATHS_BYTES = 24576
"""Of all measured paths of a record: about 250 of them, or 60 with long warnings."""

MAX_PATH_NAME_CHARS = 64
"""Of a path's transport and detail."""

MAX_PATH_TEXT_CHARS = 240
"""Of a path's warning and error."""
