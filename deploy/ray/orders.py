"""From settings to what a worker on Ray shall be, and what it takes of its node."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from deploy.ray.placement import Bundle
from deploy.ray.worker_actor import Order
from slipstream.errors import ConfigError
from slipstream.security.files import read_tokens
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import Role


@dataclass(frozen=True, slots=True)
class Orders:
    """What all workers of one cluster have in common.

    Attributes:
        settings_id: equal for workers that were ordered by the same settings.
        bundle: that each takes of its node.
        tokens: of the cluster; workers get them, as their nodes do not have the file.
    """

    settings: Settings
    settings_yaml: str
    settings_id: str
    bundle: Bundle
    run_folder: Path
    tokens: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, settings: Settings, run_folder: Path) -> Orders:
        """What these settings mean on Ray.

        Raises:
            ConfigError: Ray would keep GPUs that no engine uses, or too few.
        """
        ray, ranks = settings.ray, settings.worker.tensor_parallel_size
        if settings.worker.engine == "vllm" and ray.gpus_per_worker not in (0, ranks):
            raise ConfigError(
                f"ray.gpus_per_worker: a worker's engine uses {ranks} GPUs (worker.tensor_parallel_size), and not the "
                f"{ray.gpus_per_worker} that Ray shall keep for it: give both the same number",
                param="ray.gpus_per_worker",
            )
        text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
        # How many there are, and where this launcher keeps its files, is nothing to a worker.
        told = settings.model_dump(mode="json", exclude={"cluster": True, "planner": True, "frontend": True})
        token_file = settings.security.cluster_token_file
        tokens = read_tokens(token_file) if token_file is not None else ()
        # Not where the token is kept here, but whether it is the same.
        told["security"]["cluster_token_file"] = [hashlib.sha256(token.encode()).hexdigest() for token in tokens]
        settings_id = hashlib.sha256(yaml.safe_dump(told).encode()).hexdigest()
        # One bundle is always on one node: so are all ranks of a worker, which talk to each other in every layer.
        bundle = {"CPU": ray.cpus_per_worker} | ({"GPU": float(ray.gpus_per_worker)} if ray.gpus_per_worker else {})
        return cls(settings, text, settings_id, bundle, run_folder, tokens)

    @property
    def model(self) -> str:
        return self.settings.served_model_name or ""

    def order(self, worker_id: str, role: Role.ValueType, now_unix_s: float) -> Order:
        worker = self.settings.worker
        threads = worker.threads
        if threads is None and worker.engine == "vllm" and self.settings.device != "cuda":
            threads = max(1, int(self.settings.ray.cpus_per_worker))
        return Order(
            worker_id=worker_id,
            model=self.model,
            role=role,
            settings_yaml=self.settings_yaml,
            settings_id=self.settings_id,
            run_folder=str(self.run_folder),
            threads=threads,
            drain_timeout_s=worker.drain_timeout_s,
            orphan_after_s=self.settings.ray.orphan_after_s,
            ordered_unix_s=now_unix_s,
            tokens=self.tokens,
        )
