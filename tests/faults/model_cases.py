"""Workers that are started with a broken model, beside a cluster that serves."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from slipstream.settings import Settings
from tests.faults.arena import Arena
from tests.faults.case import Case, Promise
from tests.faults.load import Load
from tests.faults.process_cases import BUSY_S
from tests.support import warm_processes
from tests.support.fault_cluster import run_decode

ENDS_WITHIN_S = 120.0

Spoil = Callable[[Path], None]


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20:40] = b"\xff" * 20
    path.write_bytes(bytes(content))


def spoil_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:-40])


def other_shapes(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["intermediate_size"] *= 2
    path.write_text(json.dumps(config))


def unknown_architecture(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(architectures=["NobodyKnowsForCausalLM"], model_type="nobody_knows")
    path.write_text(json.dumps(config))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


async def start_with(arena: Arena, load: Load, *, name: str, spoil: Spoil, says: str) -> None:
    """A worker with a copy of the model that is broken: it must end, and say why in one sentence."""
    folder = arena.folder / f"model-{name}"
    await asyncio.to_thread(shutil.copytree, arena.model, folder, dirs_exist_ok=True)
    spoil(folder)
    await start_and_expect_the_end(
        arena, load, name, lambda settings: settings.model_copy(update={"model": str(folder)}), says
    )


async def start_and_expect_the_end(
    arena: Arena,
    load: Load,
    name: str,
    change: Callable[[Settings], Settings],
    says: str,
    *,
    target: Callable[[Settings], None] = run_decode,
) -> None:
    """A worker with other settings cannot start: it must end, and say so by a StartupError in which `says` stands."""
    settings = arena.cluster.members[-1].settings
    worker = settings.worker.model_copy(update={"worker_id": f"broken-{name}", "port": 0, "metrics_port": 0})
    transfer = settings.transfer.model_copy(update={"port": 0})
    broken = change(settings.model_copy(update={"worker": worker, "transfer": transfer}))
    log = arena.folder / f"broken-{name}.log"
    await load.until_streaming()
    process = warm_processes.start(target, broken, log=log)
    await asyncio.to_thread(process.join, ENDS_WITHIN_S)
    measured, told = load.measured, log.read_text(errors="replace")
    if process.exitcode is None:
        measured.broken.append(f"it had not ended after {ENDS_WITHIN_S:g} s")
        process.kill()
    elif process.exitcode == 0:
        measured.broken.append("it ended as if all were well")
    last = told.rpartition("StartupError: ")[2] if "StartupError: " in told else ""
    if says not in last:
        measured.broken.append(f"its StartupError does not say {says!r}: {(last or told[-200:])[:200]!r}")
    await load.until_answered(4)
    if not await arena.all_known():
        measured.broken.append("the cluster is not whole any more")


PROMISE = Promise("It ends with an error that names the file; the others serve on.", silence_s=BUSY_S)

_SPOILT: tuple[tuple[str, Spoil, str, str], ...] = (
    ("weights-cut", cut_weights, "weights that were cut short", "model.safetensors has"),
    ("weights-header", spoil_header, "weights with a broken header", "model.safetensors"),
    ("config-cut", spoil_config, "a config.json that was cut short", "config.json is not JSON"),
    ("config-shapes", other_shapes, "a config.json whose shapes are not those of the weights", "model-config-shapes"),
    ("config-unknown", unknown_architecture, "a config.json of an unknown architecture", "model-config-unknown"),
    ("tokenizer-missing", no_tokenizer, "no tokenizer.json", "lacks tokenizer.json"),
)

CASES = tuple(
    Case(
        f"model-{name}",
        "Corrupted model",
        f"a decode worker is started with {words}",
        PROMISE,
        inflict=partial(start_with, name=name, spoil=spoil, says=says),
        short=name == "weights-cut",
    )
    for name, spoil, words, says in _SPOILT
)
