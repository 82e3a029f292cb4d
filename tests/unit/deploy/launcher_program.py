"""A launcher as a process of its own, for tests that end it: `python -m tests.unit.deploy.launcher_program ...`.

Arguments: the folder, the seconds that a worker takes to end, the seconds that a graceful stop may take.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from rich.console import Console

from deploy.launch import StoppedBySignal, forever, launch
from deploy.supervisor import Report
from tests.unit.deploy.scripts import pids_of, until, worker


async def main(folder: Path, ending_s: str, stop_timeout_s: float) -> None:
    components = [
        worker(name, folder, ending_s=ending_s, stop_stage=stage)
        for stage, name in enumerate(["frontend", "decode-0", "control-plane"])
    ]

    async def ready(report: Report) -> None:
        await until(lambda: all(pids_of(component.name, folder) for component in components))
        (folder / "ready").touch()

    await launch(
        components, ready, forever, console=Console(stderr=True), ready_timeout_s=30, stop_timeout_s=stop_timeout_s
    )


if __name__ == "__main__":
    try:
        asyncio.run(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
    except StoppedBySignal as stopped:
        sys.exit(f"stopped by signal {stopped.signum}")
