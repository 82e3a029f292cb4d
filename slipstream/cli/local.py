"""`slipstream up`, `demo` and `down`: a whole cluster, on this machine or on Ray, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.autoscaling import autoscaled
from slipstream.cli.face_tls import api_key, face_tls
from slipstream.cli.flags import select, with_settings
from slipstream.cli.show import examples
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError
from slipstream.security import identity
from slipstream.security.identity import CA_FILE
from slipstream.security.names import ComponentRole
from slipstream.settings import FrontendSettings, Settings

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.plan import PlannedCluster
    from slipstream.client import Tls

PANEL = "A cluster"

QUESTION = "What is the capital of France?"

_FLAGS = select(
    "model",
    "served_model_name",
    "api_key",
    "device",
    "dtype",
    "cluster.*",
    "ray.*",
    "frontend.*",
    "security.*",
    "worker.*",
    "model_cache.*",
    "simulated.*",
    "transfer.*",
    "health.*",
    "control_plane.*",
    "planner.policy",
    "planner.dry_run",
    "log.*",
    "tracing.*",
    own={"cluster", "ray", "frontend", "worker"},
    without={
        "worker.worker_id",
        "worker.node",
        "worker.port",
        *(f"worker.{name}" for name in ("nnodes", "node_rank", "master_addr", "master_port")),
        "worker.metrics_port",
        "control_plane.address",
        "frontend.workers",
    },
) + select("frontend.workers")
_DOWN_FLAGS = select("cluster.on", "cluster.name", "ray.address", own={"cluster", "ray"})
_PUBLIC_PORTS = (("frontend", "http_port"), ("frontend", "grpc_port"), ("control_plane", "port"))
_ASK_TIMEOUT_S = 30.0

Launched = Callable[..., Coroutine[Any, Any, None]]
"""Starts a cluster, runs a body, stops it."""


def add_to(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream up", "one prefill and one decode worker with the default model"),
            ("slipstream up --prefill 2 --decode 4 --model ./my-model", "more workers, your model"),
            (
                "slipstream up --engine simulated --prefill 8 --decode 8",
                "a big one that computes nothing and keeps time",
            ),
            ("slipstream up --autoscale --max-workers 4", "the planner starts, flips and drains workers"),
            (
                "slipstream up --on ray --prefill 2 --decode 4",
                "workers on the nodes of the Ray cluster of this machine",
            ),
            ("slipstream up --http-port 0 --grpc-port 0 --control-plane-port 0", "on free ports"),
        ),
    )(up)
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream demo", f'asks "{QUESTION}"'),
            ('slipstream demo --prompt "Tell me a joke." --max-tokens 200', "asks something else"),
        ),
    )(demo)
    app.command(
        rich_help_panel=PANEL,
        epilog=examples(
            ("slipstream down --on ray", "drain and end the workers of the cluster named slipstream"),
            ("slipstream down --on ray --name chat --now", "end those of another one at once"),
        ),
    )(down)


@with_settings(*_FLAGS)
def up(loaded: LoadedConfig) -> None:
    """Start a cluster on this machine and keep it running until Ctrl-C."""
    from deploy.launch import forever
    from slipstream.cli.terminal import output

    began_s = time.monotonic()

    async def serve(cluster: PlannedCluster) -> None:
        _print_endpoints(output(), cluster, await _served_model(cluster), time.monotonic() - began_s)
        await forever()

    _run(loaded.settings, serve, ends_by_signal=True)


@with_settings(*_FLAGS)
def demo(
    loaded: LoadedConfig,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="The question to ask.")] = QUESTION,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 64,
) -> None:
    """Start a cluster, ask one question, print the answer and what it took, and stop.

    Ports that are not set are free ones, so that it runs beside another cluster.
    """

    async def ask(cluster: PlannedCluster) -> None:
        from slipstream.cli.demo_account import ask_and_account
        from slipstream.cli.terminal import output

        await ask_and_account(
            cluster.grpc_target, prompt, max_tokens, output(), _face_tls(cluster), api_key(loaded.settings)
        )

    _run(_with_free_ports(loaded), ask, ends_by_signal=False)


@with_settings(*_DOWN_FLAGS)
def down(
    loaded: LoadedConfig,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=0, help="Longest that the drains may take.")] = 60.0,
    now: Annotated[bool, typer.Option("--now", help="Kill at once; open requests are taken over or fail.")] = False,
) -> None:
    """End all workers of a cluster on Ray, also those that a killed `slipstream up` has left."""
    from slipstream.cli.terminal import output

    settings = loaded.settings
    if settings.cluster.on != "ray":
        raise ConfigError("a cluster on this machine ends with its `slipstream up`; give --on ray", param="cluster.on")
    from deploy.ray.teardown import end_cluster

    ended = end_cluster(settings, timeout_s=timeout_s, now=now)
    output().print(f"Ended {', '.join(ended)}" if ended else f"No worker of {settings.cluster.name} runs on Ray")


def _run(
    settings: Settings, body: Callable[[PlannedCluster], Coroutine[Any, Any, None]], *, ends_by_signal: bool
) -> None:
    """Start a cluster, run `body` with it, stop it.

    Args:
        ends_by_signal: once it was ready, a signal is the way to end it, and no failure.
    """
    from deploy import plan
    from deploy.launch import StoppedBySignal
    from slipstream.cli.terminal import messages

    console, home = messages(), Path.home()
    run_folder = settings.cluster.log_dir
    if run_folder is None:
        run_folder = plan.default_run_folder(os.environ, home, datetime.now(UTC), os.getpid())
        plan.forget_old_runs(os.environ, home)
    run_folder = run_folder.expanduser().absolute()
    with contextlib.ExitStack() as stack:
        if settings.cluster.autoscale:
            settings = stack.enter_context(autoscaled(settings, run_folder, console))
        elif settings.planner.policy is not None and not settings.planner.dry_run:
            raise ConfigError(
                "planner.policy is set and nobody is to act by it; add --autoscale, or --planner-dry-run",
                param="planner.policy",
            )
        cluster, launched = _planned(settings, run_folder)
        identity.install(cluster.settings.security, ComponentRole.LAUNCHER)
        where = " on Ray" if settings.cluster.on == "ray" else ""
        counts = f"{settings.cluster.prefill} prefill + {settings.cluster.decode} decode"
        console.print(f"Starting {settings.model} on {counts} workers{where}; logs in {run_folder}", soft_wrap=True)
        try:
            asyncio.run(launched(lambda: body(cluster), console=console))
        except StoppedBySignal as stopped:
            raise typer.Exit(0 if stopped.ready and ends_by_signal else 128 + stopped.signum) from None


def _planned(settings: Settings, run_folder: Path) -> tuple[PlannedCluster, Launched]:
    """The cluster, and what starts it.

    Raises:
        ConfigError: its workers would have to be started on several nodes each.
    """
    if settings.worker.nnodes > 1:
        raise ConfigError(
            f"worker.nnodes = {settings.worker.nnodes}: `slipstream up` starts each worker as a whole, on one node; "
            "start `slipstream prefill-worker` and `slipstream decode-worker` on each of its nodes",
            param="worker.nnodes",
        )
    if settings.cluster.on == "ray":
        from deploy.ray import launch as on_ray

        cluster = on_ray.plan(settings, environ=os.environ, run_folder=run_folder)
        return cluster, partial(on_ray.launch_on_ray, cluster)
    from deploy import launch, plan

    local = plan.plan(settings, environ=os.environ, run_folder=run_folder, cpus=os.sched_getaffinity(0))
    return local, partial(launch.launch_cluster, local)


def _with_free_ports(loaded: LoadedConfig) -> Settings:
    settings = loaded.settings
    for section, port in _PUBLIC_PORTS:
        if loaded.origins[f"{section}.{port}"].kind == "default":
            changed = getattr(settings, section).model_copy(update={port: 0})
            settings = settings.model_copy(update={section: changed})
    return settings


async def _served_model(cluster: PlannedCluster) -> str:
    from slipstream.client import AsyncClient

    settings = cluster.settings
    key = api_key(settings)
    if key is None and settings.security.keys_file is not None:
        return settings.served_model_name or settings.model  # nobody here may ask
    async with AsyncClient(
        cluster.grpc_target, timeout_s=_ASK_TIMEOUT_S, tls=_face_tls(cluster), api_key=key
    ) as client:
        models = await client.models()
    return models[0].id if models else settings.model


def _face_tls(cluster: PlannedCluster) -> Tls | None:
    return face_tls(cluster.settings.security) if cluster.http_url.startswith("https:") else None


def _print_endpoints(console: Console, cluster: PlannedCluster, model: str, seconds: float) -> None:
    from rich.text import Text

    question = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "stream": True,
    }
    grpc_flag = _unless_default(cluster, "--grpc-port", "frontend", "grpc_port")
    registry = cluster.settings.control_plane
    registry_flag = "" if registry.port == 7600 else f" --control-plane {registry.address}"
    security = cluster.settings.security
    tls_flag = f" --tls {security.tls_folder}" if security.tls_folder is not None else ""
    token_flag = f" --cluster-token-file {security.cluster_token_file}" if security.cluster_token_file else ""
    trust, tls = "", ""
    if security.tls_folder is not None and cluster.http_url.startswith("https:"):
        authority = security.tls_folder / CA_FILE
        trust, tls = f" --cacert {authority}", f', tls=Tls(ca_file="{authority}")'
    text = Text.assemble(
        ("\nReady", "bold green"),
        f" after {seconds:.1f} s: {model}\n\n",
        ("  OpenAI API  ", "dim"), f"{cluster.http_url}/v1\n",
        ("  gRPC        ", "dim"), f"{cluster.grpc_target}\n",
        ("  metrics     ", "dim"), f"{cluster.http_url}/metrics\n",
        ("  logs        ", "dim"), f"{cluster.run_folder}\n\n",
        ("With curl:\n", "bold"),
        f"  curl -N{trust} {cluster.http_url}/v1/chat/completions -H 'Content-Type: application/json' \\\n",
        f"    -d '{json.dumps(question)}'\n\n",
        ("In Python:\n", "bold"),
        f"  from slipstream.client import Client{', Tls' if tls else ''}\n",
        f'  with Client("{cluster.grpc_target}"{tls}) as client:\n',
        f'      print(client.chat([{{"role": "user", "content": "{QUESTION}"}}], temperature=0).collect().text)\n\n',
        ("In the terminal:\n", "bold"),
        f"  slipstream chat{grpc_flag}{tls_flag}\n  slipstream status{registry_flag}{tls_flag}{token_flag}\n\n",
        ("Ctrl-C stops everything.", "dim"),
    )  # fmt: skip
    console.print(text, soft_wrap=True)


def _unless_default(cluster: PlannedCluster, flag: str, section: str, name: str) -> str:
    value = getattr(getattr(cluster.settings, section), name)
    default = FrontendSettings.model_fields[name].default
    return "" if value == default else f" {flag} {value}"
