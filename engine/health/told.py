"""What people and other programs say of workers in `health.file`: a rack's maintenance, a node problem detector's word.

A line each: a worker's id or `*` for all, `sick` or `suspect`, and why. An empty or absent file says nothing; lines
that begin with `#` are for people.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.health.findings import SICK, SUSPECT, Finding

MAX_FILE_BYTES = 64 << 10
MAX_WHY_CHARS = 200
_STATES = {"sick": SICK, "suspect": SUSPECT}


def read_told(file: Path, worker_id: str) -> list[Finding]:
    """What the file says of this worker."""
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_FILE_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        return [Finding("told_unreadable", SUSPECT, f"{file} cannot be read ({error.strerror})")]
    return list(parse_told(text, worker_id))


def parse_told(text: str, worker_id: str) -> Iterator[Finding]:
    """A finding for each line about this worker; a line that is none of these is a finding itself."""
    for number, line in enumerate(text.splitlines(), start=1):
        who, _, rest = line.strip().partition(" ")
        word, _, why = rest.strip().partition(" ")
        if not who or who.startswith("#"):
            continue
        if word not in _STATES:
            yield Finding(
                "told_unreadable", SUSPECT, f"line {number} of health.file: expected `WORKER sick|suspect WHY`"
            )
        elif who in ("*", worker_id):
            shown = "".join(letter if letter.isprintable() else " " for letter in why.strip()[:MAX_WHY_CHARS])
            # Whoever said it takes it back by taking the line away: nothing lingers.
            yield Finding(f"told_{word}", _STATES[word], shown or f"told to be {word}", str(number), keep_s=0.0)
