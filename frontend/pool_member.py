"""One of several frontend processes on the same ports: `python -m frontend.pool_member PLACE FOLDER`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import uvloop

from frontend.pool import HANGUP, SETTINGS_FILE
from frontend.process import serve
from slipstream import telemetry, tracing
from slipstream.errors import SlipstreamError
from slipstream.settings import Settings


def main(folder: Path, index: int) -> None:
    """Serve until SIGTERM, SIGINT, or the end of the parent. Exits with 1 when it cannot.

    Args:
        index: its place among the members.
    """
    settings = Settings.model_validate_json((folder / SETTINGS_FILE).read_text())
    telemetry.configure(settings.log, component="frontend")
    # A thread, because a pipe's end must be seen also while the event loop has not begun.
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    instance = f"{socket.gethostname()}-{os.getpid()}"
    try:
        with tracing.exporting(settings.tracing, service="slipstream-frontend", instance=instance):
            uvloop.run(serve(settings, pool_folder=folder, member=index))
    except SlipstreamError as error:
        telemetry.get_logger(__name__).error("frontend_failed", reason=error.message)
        sys.exit(1)


def _end_with_parent() -> None:
    """The parent holds the other end of standard input for as long as it lives, and writes `HANGUP`s to it."""
    while os.read(sys.stdin.fileno(), 1) == HANGUP:
        if callable(signal.getsignal(signal.SIGHUP)):  # else nobody waits for it yet, and all is read anyway
            os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(Path(sys.argv[2]), int(sys.argv[1]))
