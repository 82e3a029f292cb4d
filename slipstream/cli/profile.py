"""`slipstream profile`: measures how fast a worker computes on this machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from slipstream.cli.flags import select, with_settings
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError

PANEL = "Plan and measure"

_FLAGS = select(
    "model",
    "served_model_name",
    "device",
    "dtype",
    "worker.*",
    "log.*",
    own={"worker"},
    without={
        "worker.worker_id",
        "worker.port",
        *(f"worker.{name}" for name in ("nnodes", "node_rank", "master_addr", "master_port")),
        "worker.metrics_port",
        "worker.engine",
        "worker.profile",
        "worker.drain_timeout_s",
        "worker.max_waiting",
        "worker.start_timeout_s",
        "worker.cache_events",
    },
)


def add_to(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream profile", "the default model, into ./smollm2-135m-instruct-cpu.json"),
            ("taskset -c 0 slipstream profile --threads 1", "as a worker that has one core"),
            ("slipstream up --profile smollm2-135m-instruct-cpu.json", "tell the router"),
            ("slipstream up --engine simulated --profile smollm2-135m-instruct-cpu.json", "simulate this machine"),
        ),
    )(profile)


@with_settings(*_FLAGS)
def profile(
    loaded: LoadedConfig,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the profile; from the file when absent.")
    ] = None,
    cpu_clock: Annotated[
        bool,
        typer.Option(
            "--cpu-clock",
            help="Measure by the CPU time of the engine's processes: for an engine of one thread on a busy machine.",
        ),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few points, in half a minute: shows that all works.")] = False,
) -> None:
    """Start an engine, measure prompts and decode steps, and write a profile: what the router predicts with and the
    simulated engine keeps time by. Takes some minutes; nothing else should compute meanwhile."""
    from engine.profile_process import run
    from engine.profiler import Grid
    from slipstream.cli.terminal import messages
    from slipstream.performance import encode_profile

    settings, console = loaded.settings, messages()
    file = output or Path(f"{Path(settings.model).name}-{settings.device.replace('auto', 'cpu')}.json")
    if cpu_clock and settings.worker.threads != 1:
        raise ConfigError("--cpu-clock: CPU time is what a step takes with --threads 1 only", param="cpu_clock")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {file.absolute().parent}", param="output")
    grid = Grid(prefill=(16, 64, 256), batches=(1, 4), contexts=(129, 513), steps=8, repeats=2) if quick else Grid()
    source = " ".join(["slipstream", *(argument for argument in sys.argv[1:])])
    began_s = time.monotonic()
    console.print(f"Measuring {settings.model}; the engine loads first", soft_wrap=True)
    made = run(
        settings,
        name=name or file.stem,
        source=source,
        grid=grid,
        say=lambda line: console.print(f"  {line}"),
        cpu_clock=cpu_clock,
    )
    file.write_bytes(encode_profile(made))
    console.print(f"Wrote {file} after {time.monotonic() - began_s:.0f} s", soft_wrap=True)
