"""What `slipstream up --on ray` decides before anything runs, and what a worker is ordered to be."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from deploy.plan import CONTROL_PLANE, FRONTEND, STAGE_CONTROL_PLANE, STAGE_FRONTEND, STAGE_WORKERS
from deploy.ray.launch import plan
from deploy.ray.orders import Orders
from deploy.ray.process import COMPONENT as POOL
from slipstream import config
from slipstream.errors import ConfigError
from slipstream.security.files import read_tokens
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import ROLE_DECODE

PORTS = {"frontend.http_port": 0, "frontend.grpc_port": 0, "control_plane.port": 0}


def settings(**changed: object) -> Settings:
    paths = {name.replace("__", "."): value for name, value in changed.items()}
    return config.load({"cluster.on": "ray", "served_model_name": "m", **PORTS, **paths}, {}, None).settings


def home(folder: Path) -> dict[str, str]:
    """Where tokens are kept, away from the user's."""
    return {"XDG_STATE_HOME": str(folder / "state")}


def test_control_plane_pool_and_frontend_run_here_and_the_workers_end_between_the_two(tmp_path: Path) -> None:
    cluster = plan(settings(), environ={"SLIPSTREAM_LOG__LEVEL": "debug"} | home(tmp_path), run_folder=tmp_path)
    assert {one.name: one.stop_stage for one in cluster.components} == {
        FRONTEND: STAGE_FRONTEND,
        POOL: STAGE_WORKERS,
        CONTROL_PLANE: STAGE_CONTROL_PLANE,
    }
    assert all(one.essential and "SLIPSTREAM_LOG__LEVEL" not in one.environ for one in cluster.components)


def test_workers_find_the_control_plane_where_the_head_of_ray_reaches_this_machine(tmp_path: Path) -> None:
    cluster = plan(settings(ray__address="127.0.0.1:6379"), environ={}, run_folder=tmp_path)
    assert cluster.settings.control_plane.address == f"127.0.0.1:{cluster.settings.control_plane.port}"
    told = yaml.safe_load((tmp_path / "slipstream.yaml").read_text())
    assert told["control_plane"]["address"] == cluster.settings.control_plane.address


def test_an_address_that_was_set_is_kept(tmp_path: Path) -> None:
    cluster = plan(
        settings(control_plane__host="0.0.0.0", ray__address="127.0.0.1:6379"),
        environ=home(tmp_path),
        run_folder=tmp_path,
    )
    assert cluster.settings.control_plane.host == "0.0.0.0"


def test_a_cluster_that_other_machines_reach_has_a_token_which_its_successor_has_too(tmp_path: Path) -> None:
    reachable = settings(control_plane__host="0.0.0.0", ray__address="127.0.0.1:6379")
    told = plan(reachable, environ=home(tmp_path), run_folder=tmp_path / "one").settings
    again = plan(reachable, environ=home(tmp_path), run_folder=tmp_path / "two").settings
    file = told.security.cluster_token_file
    assert file is not None
    assert file == again.security.cluster_token_file
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (token,) = read_tokens(file)
    orders = Orders.of(told, tmp_path)
    order = orders.order("w", ROLE_DECODE, 0.0)
    assert order.tokens == (token,)
    assert token not in f"{order} {orders} {order.settings_yaml}"
    file.write_text("another-token-0123456789abcdef\n")
    assert Orders.of(told, tmp_path).settings_id != orders.settings_id


def test_a_cluster_on_one_machine_or_with_certificates_has_none(tmp_path: Path) -> None:
    alone = settings(ray__address="127.0.0.1:6379")
    certified = settings(control_plane__host="0.0.0.0", security__tls_folder=str(tmp_path))
    for one in (alone, certified):
        told = plan(one, environ=home(tmp_path), run_folder=tmp_path / "run").settings
        assert told.security.cluster_token_file is None


def test_how_many_workers_a_planner_may_start_has_to_be_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-workers"):
        plan(settings(cluster__autoscale=True), environ={}, run_folder=tmp_path)


def test_workers_of_a_cluster_that_only_has_another_size_are_the_same_workers(tmp_path: Path) -> None:
    one = Orders.of(settings(cluster__decode=1), tmp_path)
    assert Orders.of(settings(cluster__decode=3), tmp_path).settings_id == one.settings_id
    assert Orders.of(settings(model="other"), tmp_path).settings_id != one.settings_id


def test_a_worker_takes_what_the_settings_say_and_computes_on_no_more_threads(tmp_path: Path) -> None:
    of_two = {"ray__gpus_per_worker": 2, "worker__tensor_parallel_size": 2}
    orders = Orders.of(settings(ray__cpus_per_worker=4.0, device="cpu", **of_two), tmp_path)
    assert orders.bundle == {"CPU": 4.0, "GPU": 2.0}
    assert orders.order("worker-0", ROLE_DECODE, 0.0).threads == 4
    told = Orders.of(settings(ray__cpus_per_worker=4.0, worker__threads=3), tmp_path)
    assert told.order("worker-0", ROLE_DECODE, 0.0).threads == 3


@pytest.mark.parametrize(("gpus", "ranks"), [(2, 1), (1, 2), (8, 4)])
def test_gpus_that_no_engine_would_use_are_not_kept(tmp_path: Path, gpus: int, ranks: int) -> None:
    with pytest.raises(ConfigError, match=rf"uses {ranks} GPUs .worker.tensor_parallel_size., and not the {gpus}"):
        Orders.of(settings(ray__gpus_per_worker=gpus, worker__tensor_parallel_size=ranks), tmp_path)
