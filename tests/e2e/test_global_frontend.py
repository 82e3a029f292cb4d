"""A global frontend before two whole clusters of simulated workers, all started as a user starts them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import psutil
import pytest
import yaml

from slipstream.free_ports import free_port
from slipstream.v1.inference_pb2 import GenerateRequest, TokenIds
from slipstream.v1.inference_pb2_grpc import InferenceStub
from slipstream.v1.sampling_pb2 import SamplingParams
from tests.support.cluster import Cluster, scrape, wait_for
from tests.support.text_model_folder import write_model_folder

KEY = "the key of these tests"


class GlobalFrontend:
    """`slipstream global-frontend` with these clusters."""

    def __init__(self, folder: Path, clusters: list[dict[str, Any]]) -> None:
        folder.mkdir()
        self.port, self.grpc_port = free_port(), free_port()
        settings = {
            "frontend": {"http_port": self.port, "grpc_port": self.grpc_port},
            "global_frontend": {"clusters": clusters, "poll_every_s": 0.25, "stale_after_s": 3.0},
        }
        self._file = folder / "peers.yaml"
        self._file.write_text(yaml.safe_dump(settings))
        self.log = folder / "log"
        self.pid = 0

    @contextmanager
    def running(self) -> Iterator[GlobalFrontend]:
        argv = [sys.executable, "-m", "slipstream", "global-frontend", "--config", str(self._file)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        with self.log.open("wb") as output:
            process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, env=environ)
        self.pid = process.pid
        try:
            wait_for("the global frontend knows its clusters", self._settled, timeout_s=60)
            yield self
        finally:
            process.terminate()
            assert process.wait(30) == 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def clusters(self) -> dict[str, dict[str, Any]]:
        """By name, what it knows."""
        answer = httpx.get(f"{self.url}/slipstream/v1/clusters", timeout=10)
        return {one["cluster"]: one for one in answer.json()["clusters"]}

    def _settled(self) -> bool:
        try:
            return all(one["state"] or one["why"] for one in self.clusters().values())
        except httpx.TransportError:
            return False

    async def tokens(self, prompt_ids: Sequence[int]) -> list[int]:
        """Eighty greedy tokens over gRPC."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            request = GenerateRequest(
                model="sim",
                token_ids=TokenIds(ids=prompt_ids),
                sampling=SamplingParams(max_tokens=80, temperature=0, ignore_eos=True),
            )
            call = cast("Any", InferenceStub(channel).Generate(request, timeout=60))
            return [token async for response in call for token in response.token_ids]

    async def ask(self, client: httpx.AsyncClient, prompt: str, **more: Any) -> httpx.Response:
        body = {"model": "sim", "prompt": prompt, "max_tokens": 4, **more}
        return await client.post(f"{self.url}/v1/completions", json=body)


class Clusters:
    """Two of them, which can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self._model = write_model_folder(folder, config={"max_position_embeddings": 8192})
        self._config = folder / "cluster.yaml"
        self._config.write_text(yaml.safe_dump({"admission": {"peer_key_sha256": sha256(KEY.encode()).hexdigest()}}))
        self._folder, self._starts = folder, 0
        self.ports = {"near": free_port(), "far": free_port()}
        self.grpc_ports = {"near": free_port(), "far": free_port()}
        self.running: dict[str, Cluster] = {}

    def start(self, name: str) -> None:
        self._starts += 1
        flags = ("--config", str(self._config), "--engine", "simulated", "--served-model-name", "sim")
        folder = self._folder / f"{name}-{self._starts}"
        cluster = Cluster(self._model, folder, *flags, *self._ports(name))
        self.running[name] = cluster.__enter__()

    def _ports(self, name: str) -> tuple[str, ...]:
        return "--http-port", str(self.ports[name]), "--grpc-port", str(self.grpc_ports[name])

    def kill(self, name: str) -> None:
        """All its processes at once, as when a machine loses its power."""
        cluster = self.running.pop(name)
        for process in cluster.processes():
            process.kill()
        assert cluster.process is not None
        cluster.process.wait(10)

    def stop(self) -> None:
        for name in list(self.running):
            self.running.pop(name).stop()

    def peers(self) -> list[dict[str, Any]]:
        named = [
            {"name": name, "http": [f"http://127.0.0.1:{self.ports[name]}"], "key": KEY,
             "grpc": [f"127.0.0.1:{self.grpc_ports[name]}"]}
            for name in self.ports
        ]  # fmt: skip
        return [*named, {"name": "locked", "http": [f"http://127.0.0.1:{self.ports['near']}"], "key": "a wrong key"}]


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    both = Clusters(tmp_path_factory.mktemp("clusters"))
    with ExitStack() as stack:
        stack.callback(both.stop)
        with ThreadPoolExecutor() as starting:
            list(starting.map(both.start, both.ports))
        yield both


@pytest.fixture(scope="module")
def frontend(clusters: Clusters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlobalFrontend]:
    with GlobalFrontend(tmp_path_factory.mktemp("global") / "run", clusters.peers()).running() as running:
        yield running


def prompt(seed: int, words: int = 80) -> str:
    return " ".join(random.Random(seed).choices(["alpha", "river", "stone", "cloud", "house"], k=words))


def answered_by(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-slipstream-cluster"].partition(";")[0]


def test_a_wrong_key_is_said_and_that_cluster_gets_nothing(frontend: GlobalFrontend) -> None:
    shown = frontend.clusters()
    assert (shown["locked"]["health"], shown["near"]["health"], shown["far"]["health"]) == ("down", "up", "up")
    assert "refuses this global frontend's key" in shown["locked"]["why"]
    assert "refuses this global frontend's key" in frontend.log.read_text()
    argv = [sys.executable, "-m", "slipstream", "clusters", "--frontend-http-port", str(frontend.port)]
    printed = subprocess.run(
        argv, capture_output=True, text=True, check=True, timeout=30, env={**os.environ, "COLUMNS": "200"}
    )
    assert [line.split()[:3] for line in printed.stdout.splitlines()[1:]] == [
        ["near/0", "up", "sim"], ["far/0", "up", "sim"], ["locked/0", "down", "0.0"]
    ]  # fmt: skip


async def test_load_goes_to_both_clusters(frontend: GlobalFrontend) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        answers = await asyncio.gather(*(frontend.ask(client, prompt(seed)) for seed in range(8)))
    counted = Counter(map(answered_by, answers))
    assert min(counted["near"], counted["far"]) >= 2, counted


async def test_a_prompt_goes_where_its_beginning_is_cached_also_from_a_global_frontend_that_has_never_seen_it(
    frontend: GlobalFrontend, clusters: Clusters, tmp_path: Path
) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        where = {seed: answered_by(await frontend.ask(client, prompt(seed))) for seed in (101, 102)}
        other = GlobalFrontend(tmp_path / "other", clusters.peers())
        with other.running():
            known = {name: one["prefixes"] for name, one in other.clusters().items()}
            for seed, cluster in where.items():
                assert known[cluster] > 0
                answer = await other.ask(client, f"{prompt(seed)} and then")
                assert answer.headers["x-slipstream-cluster"] == f"{cluster}; prefix_hit"
                assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


async def test_a_cluster_killed_under_load_fails_no_request_that_had_not_begun_and_is_used_again_when_it_is_back(
    frontend: GlobalFrontend, clusters: Clusters
) -> None:
    stop, outcomes = asyncio.Event(), Counter[str]()
    prompts = [[10 + number] * 40 for number in range(4)]
    undisturbed = await asyncio.gather(*map(frontend.tokens, prompts))

    async def load(number: int) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            turn = 0
            while not stop.is_set():
                turn += 1
                streams = (number + turn) % 2 == 0
                answer = await frontend.ask(client, prompt(1000 * number + turn, 20), max_tokens=8, stream=streams)
                outcomes[_outcome(answer, streams=streams)] += 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(load(number))
        await asyncio.sleep(0.5)
        disturbed = [tasks.create_task(frontend.tokens(one)) for one in prompts]
        await asyncio.sleep(1.8)
        before = outcomes.total()
        await asyncio.to_thread(clusters.kill, "near")
        await asyncio.sleep(3)
        stop.set()
    assert before > 0
    assert outcomes.total() > before
    # An answer that had begun there ends with an event that says so; four requests were open.
    assert set(outcomes) <= {"answered", "cluster_lost"}, outcomes
    assert outcomes["cluster_lost"] <= 4
    # Over gRPC, with token ids, what had begun there went on elsewhere with the same tokens.
    assert [one.result() for one in disturbed] == undisturbed
    metrics = scrape(f"{frontend.url}/metrics")
    assert metrics["slipstream_global_failovers_total:near:resumed"] >= 1
    assert frontend.clusters()["near"]["health"] == "down"
    await asyncio.to_thread(clusters.start, "near")
    await asyncio.to_thread(
        wait_for, "it is up again", lambda: frontend.clusters()["near"]["health"] != "down", timeout_s=20
    )
    async with httpx.AsyncClient(timeout=60) as client:
        answers = await asyncio.gather(*(frontend.ask(client, prompt(seed)) for seed in range(200, 208)))
    assert Counter(map(answered_by, answers))["near"] >= 1


def _outcome(answer: httpx.Response, *, streams: bool) -> str:
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text[:200]}"
    if not streams:
        return "answered" if answer.json()["usage"]["completion_tokens"] == 8 else "short"
    last = answer.text.strip().rsplit("\n\n", 1)[-1].removeprefix("data: ")
    return "answered" if last == "[DONE]" else str(json.loads(last)["error"]["code"])


def test_it_loads_neither_torch_nor_vllm(frontend: GlobalFrontend) -> None:
    maps = psutil.Process(frontend.pid).memory_maps()
    assert not [one.path for one in maps if "/torch/" in one.path or "/vllm/" in one.path]
