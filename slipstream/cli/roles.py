"""The roles, each one process: what `slipstream up` starts, and what Kubernetes or systemd would start."""

from __future__ import annotations

import typer

from slipstream.cli.flags import Flag, select, with_settings
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig

PANEL = "Roles, one process each"

_FRONTEND_FLAGS = select(
    "model",
    "served_model_name",
    "frontend.*",
    "control_plane.address",
    "security.*",
    "log.*",
    "tracing.*",
    own={"frontend"},
)
_GLOBAL_FLAGS = select(
    *(f"frontend.{name}" for name in ("host", "http_port", "grpc_port", "max_body_bytes", "request_timeout_s")),
    "frontend.drain_timeout_s",
    "global_frontend.*",
    "security.*",
    "log.*",
    own={"frontend", "global_frontend"},
    without={"global_frontend.clusters"},
)
_WORKER_FLAGS: tuple[Flag, ...] = select(
    "model",
    "served_model_name",
    "device",
    "dtype",
    "worker.*",
    "model_cache.*",
    "simulated.*",
    "control_plane.address",
    "transfer.*",
    "health.*",
    "security.*",
    "log.*",
    "tracing.*",
    own={"worker"},
)
_PLANNER_FLAGS = select(
    "control_plane.*",
    "planner.*",
    "health.*",
    "kubernetes.*",
    "security.*",
    "log.*",
    own={"control_plane", "planner"},
    without={"control_plane.address"},
)


def add_to(app: typer.Typer, planner: typer.Typer) -> None:
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream frontend --control-plane 10.0.0.1:7600 --host 0.0.0.0", "serve a cluster's workers"),
            ("slipstream frontend --http-port 9000 --grpc-port 9001", "on other ports"),
        ),
    )(frontend)
    app.command(
        "global-frontend",
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream global-frontend --config peers.yaml", "serve the clusters that the file names"),
            ("slipstream global-frontend --config peers.yaml --host 0.0.0.0 --http-port 80", "for everybody"),
        ),
    )(global_frontend)
    app.command("prefill-worker", rich_help_panel=PANEL, epilog=_worker_examples("prefill-worker"))(prefill_worker)
    app.command("decode-worker", rich_help_panel=PANEL, epilog=_worker_examples("decode-worker"))(decode_worker)
    planner.command(
        "serve",
        epilog=examples(
            ("slipstream planner serve", "on this machine alone"),
            ("slipstream planner serve --host 0.0.0.0 --port 7600", "for workers on other machines too"),
            ("slipstream planner serve --policy policy.yaml --dry-run", "decide and tell, and do nothing"),
            ("slipstream planner serve --policy policy.yaml --scaler kubernetes", "in a pod: scale Deployments"),
        ),
    )(planner_serve)


@with_settings(*_FRONTEND_FLAGS)
def frontend(loaded: LoadedConfig) -> None:
    """Run a frontend: the OpenAI-compatible HTTP face and the gRPC face, until SIGTERM or Ctrl-C."""
    import uvloop

    from slipstream import telemetry

    telemetry.configure(loaded.settings.log, component="frontend")
    if loaded.settings.frontend.workers > 1:
        from frontend.pool import supervise

        uvloop.run(supervise(loaded.settings))
        return
    from frontend.process import serve

    uvloop.run(serve(loaded.settings))


@with_settings(*_GLOBAL_FLAGS)
def global_frontend(loaded: LoadedConfig) -> None:
    """Run a frontend before several clusters: each request goes to one of them, until SIGTERM or Ctrl-C."""
    import uvloop

    from slipstream import telemetry

    telemetry.configure(loaded.settings.log, component="global-frontend")
    from frontend.clusters.process import serve

    uvloop.run(serve(loaded.settings))


@with_settings(*_WORKER_FLAGS)
def prefill_worker(loaded: LoadedConfig) -> None:
    """Run a prefill worker: it computes prompts and hands their KV blocks over, until SIGTERM or Ctrl-C."""
    from prefill_worker.process import run

    run(loaded.settings)


@with_settings(*_WORKER_FLAGS)
def decode_worker(loaded: LoadedConfig) -> None:
    """Run a decode worker: it takes KV blocks over and generates, until SIGTERM or Ctrl-C."""
    from decode_worker.process import run

    run(loaded.settings)


@with_settings(*_PLANNER_FLAGS)
def planner_serve(loaded: LoadedConfig) -> None:
    """Run the control plane: the registry of workers, and the planner of their counts, until SIGTERM or Ctrl-C."""
    import sys
    from functools import partial
    from pathlib import Path

    import uvloop

    from deploy.kubernetes.scaler import open_scaler
    from engine.simulated.profile_choice import profile_path
    from slipstream import telemetry

    telemetry.configure(loaded.settings.log, component="control-plane")
    from planner.server import serve

    simulator = (sys.executable, "-P", "-m", "simulator.child")
    scalers = {"kubernetes": partial(open_scaler, loaded.settings.kubernetes)}
    uvloop.run(serve(loaded.settings, lambda name: profile_path(Path(name)), simulator=simulator, scalers=scalers))


def _worker_examples(role: str) -> str:
    return examples(
        (f"slipstream {role} --model ./my-model --device cpu --threads 8", "a local model folder"),
        (f"slipstream {role} --control-plane 10.0.0.1:7600 --host 10.0.0.2", "join a cluster on other machines"),
    )
