"""A whole frontend before a scripted cluster: both faces, really listening, and the real dispatcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from frontend.explanation import Explainer
from frontend.process import bound_socket, run_faces
from frontend.tokenizer import TextModel
from slipstream.settings import FrontendSettings
from tests.support.scripted_cluster import ScriptedCluster
from tests.support.scripted_worker import MODEL
from tests.support.text_model_folder import write_model_folder


@asynccontextmanager
async def listening_frontend(cluster: ScriptedCluster, folder: Path) -> AsyncIterator[str]:
    """Yields the URL of the HTTP face; see `listening_faces`."""
    async with listening_faces(cluster, folder) as (url, _):
        yield url


@asynccontextmanager
async def listening_faces(cluster: ScriptedCluster, folder: Path) -> AsyncIterator[tuple[str, str]]:
    """Yields the URL of the HTTP face and the address of the gRPC face.

    Args:
        folder: an empty one, for the model's files.
    """
    settings = FrontendSettings(http_port=0, grpc_port=0, drain_timeout_s=5)
    text_model = TextModel.load(write_model_folder(folder))
    stop, listening = asyncio.Event(), asyncio.Event()
    where = "", ""

    def note(http: str, grpc_address: str) -> None:
        nonlocal where
        where = f"http://{http}", grpc_address
        listening.set()

    with bound_socket(settings) as http_socket:
        faces = asyncio.create_task(
            run_faces(
                settings,
                cluster.dispatcher,
                text_model,
                model_name=MODEL,
                http_socket=http_socket,
                stop=stop,
                listening=note,
                explain=Explainer(cluster.dispatcher.routing.decisions).find,
            )
        )
        try:
            async with asyncio.timeout(10):
                await listening.wait()
            yield where
        finally:
            stop.set()
            await faces
