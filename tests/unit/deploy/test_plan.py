"""From settings to processes: what each is told, where it runs, and what it may listen on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.plan import LocalCluster, default_run_folder, forget_old_runs, plan
from slipstream import config
from slipstream.errors import ConfigError, StartupError

ANY_PORTS: dict[str, object] = {"frontend.http_port": 0, "frontend.grpc_port": 0, "control_plane.port": 0}


def planned(
    folder: Path,
    changed: dict[str, object] | None = None,
    *,
    cpus: range = range(2),
    environ: dict[str, str] | None = None,
) -> LocalCluster:
    flags = {**ANY_PORTS, **(changed or {})}
    settings = config.load(flags, {}, None).settings
    return plan(settings, environ=environ or {}, run_folder=folder, cpus=cpus, python="python")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield listener.getsockname()[1]


def test_a_cluster_is_a_control_plane_its_workers_and_a_frontend(tmp_path: Path) -> None:
    cluster = planned(tmp_path, {"cluster.prefill": 2, "cluster.decode": 1})
    names = [component.name for component in cluster.components]
    assert names == ["control-plane", "prefill-0", "prefill-1", "decode-0", "frontend"]
    assert cluster.worker_names == {"prefill-0", "prefill-1", "decode-0"}
    roles = [component.argv[4] for component in cluster.components]
    assert roles == ["planner", "prefill-worker", "prefill-worker", "decode-worker", "frontend"]


def test_the_frontend_stops_first_and_the_control_plane_last(tmp_path: Path) -> None:
    stages = {component.name: component.stop_stage for component in planned(tmp_path).components}
    assert stages["frontend"] < stages["prefill-0"] == stages["decode-0"] < stages["control-plane"]


def test_the_cluster_lives_on_without_a_worker_but_not_without_the_others(tmp_path: Path) -> None:
    essential = {component.name for component in planned(tmp_path).components if component.essential}
    assert essential == {"frontend", "control-plane"}


def test_children_load_exactly_the_resolved_settings(tmp_path: Path) -> None:
    cluster = planned(tmp_path, {"model": "m", "worker.kv_cache_bytes": 1 << 24, "transfer.mode": "staged"})
    for component in cluster.components:
        file = Path(component.argv[component.argv.index("--config") + 1])
        assert config.load({}, component.environ, file).settings == cluster.settings
    assert cluster.settings.worker.kv_cache_bytes == 1 << 24


def test_inherited_variables_do_not_confuse_the_children(tmp_path: Path) -> None:
    environ = {"SLIPSTREAM_MODEL": "other", "SLIPSTREAM_CONFIG": "x.yaml", "PATH": "/bin", "PYTHONPATH": "/mine"}
    for component in planned(tmp_path, environ=environ).components:
        assert component.environ["PATH"] == "/bin"
        assert component.environ["PYTHONPATH"].endswith(":/mine")
        assert not [name for name in component.environ if name.startswith("SLIPSTREAM_")]


def test_ports_of_0_become_free_ports_that_differ(tmp_path: Path) -> None:
    settings = planned(tmp_path).settings
    ports = {settings.frontend.http_port, settings.frontend.grpc_port, settings.control_plane.port}
    assert len(ports) == 3
    assert 0 not in ports
    assert settings.control_plane.address == f"127.0.0.1:{settings.control_plane.port}"
    assert (settings.worker.port, settings.worker.metrics_port) == (0, 0)


@pytest.mark.parametrize("setting", ["frontend.http_port", "frontend.grpc_port", "control_plane.port"])
def test_a_taken_port_is_named_with_its_setting_and_a_remedy(tmp_path: Path, taken_port: int, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} = {taken_port}: cannot listen .* choose another port with --"):
        planned(tmp_path, {setting: taken_port})


def test_one_port_for_two_faces_is_refused(tmp_path: Path, taken_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    with pytest.raises(ConfigError, match=f"grpc_port = {free} is used twice"):
        planned(tmp_path, {"frontend.http_port": free, "frontend.grpc_port": free})


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        planned(tmp_path, {"frontend.host": "192.0.2.1", "security.anonymous": True})


def test_what_listens_everywhere_is_reached_over_loopback(tmp_path: Path) -> None:
    cluster = planned(
        tmp_path, {"frontend.host": "0.0.0.0", "control_plane.host": "0.0.0.0", "security.anonymous": True}
    )
    assert cluster.http_url == f"http://127.0.0.1:{cluster.settings.frontend.http_port}"
    assert cluster.grpc_target == f"127.0.0.1:{cluster.settings.frontend.grpc_port}"
    assert cluster.settings.control_plane.address == f"127.0.0.1:{cluster.settings.control_plane.port}"


def cpus_and_threads(cluster: LocalCluster) -> list[tuple[tuple[int, ...], str | None]]:
    return [
        (component.cpus, dict(zip(component.argv, component.argv[1:], strict=False)).get("--threads"))
        for component in cluster.components
        if component.name in cluster.worker_names
    ]


def test_two_workers_on_two_cpus_get_one_each_and_the_others_all(tmp_path: Path) -> None:
    cluster = planned(tmp_path)
    assert cpus_and_threads(cluster) == [((0,), "1"), ((1,), "1")]
    assert [component.cpus for component in cluster.components if component.essential] == [(), ()]


def test_more_workers_than_cpus_share_them_with_one_thread_each(tmp_path: Path) -> None:
    assert cpus_and_threads(planned(tmp_path, {"cluster.decode": 2})) == [((), "1")] * 3


def test_a_worker_alone_has_the_whole_machine(tmp_path: Path) -> None:
    assert cpus_and_threads(planned(tmp_path, {"cluster.prefill": 0})) == [((), None)]


def test_asked_for_threads_are_not_squeezed_into_fewer_cpus(tmp_path: Path) -> None:
    assert cpus_and_threads(planned(tmp_path, {"worker.threads": 2})) == [((), None)] * 2
    assert cpus_and_threads(planned(tmp_path, {"worker.threads": 1})) == [((0,), None), ((1,), None)]


def test_a_run_folder_that_cannot_be_written_is_said_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="choose another with --log-dir"):
        planned(tmp_path / "file" / "run")


NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("environ", "state"),
    [
        ({}, "/u/.local/state"),
        ({"XDG_STATE_HOME": "/state"}, "/state"),
        ({"XDG_STATE_HOME": "x"}, "/u/.local/state"),
    ],
)
def test_runs_are_kept_in_the_users_state_folder(environ: dict[str, str], state: str) -> None:
    folder = default_run_folder(environ, Path("/u"), NOW, 77)
    assert folder == Path(state) / "slipstream" / "20260102T030405Z-77"


def test_only_the_latest_runs_are_kept_and_nothing_else_is_touched(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    folders = [default_run_folder(environ, tmp_path, NOW.replace(minute=minute), 1) for minute in range(30)]
    mine = tmp_path / "slipstream" / "notes"
    for folder in [*folders, mine]:
        folder.mkdir(parents=True)
    forget_old_runs(environ, tmp_path)
    assert [folder.exists() for folder in folders] == [False] * 10 + [True] * 20
    assert mine.exists()
