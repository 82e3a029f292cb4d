"""What the pods run is what the product takes: commands, flags, settings files, ports and probes."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from engine.node_group import NodeGroup
from slipstream import config
from slipstream.cli.app import app
from slipstream.config_layer import setting_fields
from slipstream.errors import ConfigError
from slipstream.settings import Settings
from tests.unit.deploy.helm.chart import (
    CASES,
    ROLES,
    ROOT,
    Object,
    component,
    container,
    environment,
    follows,
    is_worker,
    named,
    objects,
    own_objects,
    pod_templates,
)

POD = {
    "POD_IP": "10.1.2.3",
    "POD_NAME": "demo-0",
    "POD_NAMESPACE": "llm",
    "NODE_NAME": "node-1",
    # As LeaderWorkerSet sets them in the second pod of a group.
    "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
    "LWS_LEADER_ADDRESS": "demo-0.demo.llm",
}
IMAGES = ROOT / "deploy" / "images"


def processes(case: str) -> list[tuple[str, Object]]:
    return list(pod_templates(objects(CASES[case])))


def started(case: str, ending: str) -> tuple[Object, Settings]:
    """A pod whose owner's name ends so, and the settings that its process would have."""
    rendered = objects(CASES[case])
    pod = next(template for name, template in pod_templates(rendered) if name.endswith(ending))
    return pod, loaded(rendered, pod)


def loaded(rendered: list[Object], pod: Object) -> Settings:
    """As the product loads them: the pod's flags, its environment, and its settings file.

    Raises:
        ConfigError: the product refuses them.
    """
    variables = {name: filled(value) for name, value in environment(pod).items()}
    arguments = [filled(each) for each in container(pod)["args"]]
    # Without the command's own flags, which are no settings.
    values = {name: value for name, value in flags(arguments).items() if name in setting_fields()}
    file = mounted(rendered, pod, variables["SLIPSTREAM_CONFIG"])
    return config.load(values, variables, file).settings


def filled(text: str) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: POD.get(match[1], match[0]), text)


_FILES: dict[str, Path] = {}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    _FILES["folder"] = tmp_path


def mounted(rendered: list[Object], pod: Object, path: str) -> Path:
    """The file that the container finds at this path, which must come from a ConfigMap."""
    folder, _, name = path.rpartition("/")
    (mount,) = [each for each in container(pod)["volumeMounts"] if each["mountPath"] == folder]
    (volume,) = [each for each in pod["spec"]["volumes"] if each["name"] == mount["name"]]
    source = volume["configMap"]
    (key,) = [each["key"] for each in source["items"] if each["path"] == name]
    settings = next(
        each for each in rendered if each["kind"] == "ConfigMap" and each["metadata"]["name"] == source["name"]
    )
    file = _FILES["folder"] / name
    file.write_text(settings["data"][key])
    return file


@functools.cache
def _cli() -> Any:
    return typer.main.get_command(app)


def flags(arguments: list[str]) -> dict[str, Any]:
    """The settings that a command line gives; fails where the command or a flag does not exist."""
    command = _cli()
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    # Not resilient: an unknown flag, or a value of the wrong type, is an error.
    given = command.make_context(command.name, arguments).params
    return {name.replace("__", "."): value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("case", CASES)
def test_the_product_takes_every_command_flag_and_setting(case: str) -> None:
    rendered = objects(CASES[case])
    for _, pod in pod_templates(rendered):
        assert container(pod)["command"] == ["slipstream"]
        if component(pod) != "test":
            loaded(rendered, pod)


def test_the_check_sees_a_flag_and_a_setting_that_do_not_exist() -> None:
    rendered = own_objects(CASES["defaults"])
    pod = next(template for name, template in pod_templates(rendered) if name.endswith("decode"))
    with pytest.raises(Exception, match="No such option: --hots"):
        flags(["decode-worker", "--hots", "x"])
    settings = named(rendered, "ConfigMap", "demo-slipstream")
    settings["data"]["decode.yaml"] += "\ntransfers: {}"
    with pytest.raises(ConfigError, match="transfers"):
        loaded(rendered, pod)


def test_the_test_pod_asks_for_the_status_of_the_release() -> None:
    pod = next(template for _, template in processes("defaults") if component(template) == "test")

    assert container(pod)["args"][0] == "status"
    assert "demo-slipstream-control-plane.llm.svc:7600" in flags(container(pod)["args"]).values()


def test_frontends_and_workers_find_the_control_plane_by_its_service() -> None:
    service = named(objects(CASES["defaults"]), "Service", "control-plane")
    address = (
        f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{service['spec']['ports'][0]['port']}"
    )

    for ending in ("frontend", *ROLES):
        assert started("defaults", ending)[1].control_plane.address == address


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("role", ROLES)
def test_a_worker_tells_others_its_pods_address_and_name(case: str, role: str) -> None:
    ending = f"{role} (leader)" if "groups" in case else role
    _, settings = started(case, ending)

    assert (settings.worker.host, settings.worker.worker_id) == (POD["POD_IP"], POD["POD_NAME"])
    assert settings.worker.node == POD["NODE_NAME"]
    assert settings.transfer.host is None


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("large-groups")])
def test_the_product_makes_of_a_groups_pods_the_nodes_that_are_meant(case: str) -> None:
    rendered = objects(CASES[case])
    for _, pod in pod_templates(rendered):
        if "slipstream.dev/member" not in pod["metadata"]["labels"]:
            continue
        worker = loaded(rendered, pod).worker
        group = NodeGroup.of(worker)
        assert (group.nodes, group.rank, group.leader) == (2, 1, POD["LWS_LEADER_ADDRESS"])
        assert group.local_ranks == CASES[case]["accelerator"]["count"]
        # As the notes and the page have it; the tie is one port after that.
        assert (group.port, group.tie_port) == (29501, 29502)


@pytest.mark.parametrize("case", CASES)
def test_every_port_of_a_container_is_one_that_its_process_listens_on(case: str) -> None:
    rendered = objects(CASES[case])
    for _, pod in pod_templates(rendered):
        ports = {each["name"]: each["containerPort"] for each in container(pod).get("ports", ())}
        if component(pod) == "test":
            continue
        settings = loaded(rendered, pod)
        listening = {
            "frontend": {"http": settings.frontend.http_port, "grpc": settings.frontend.grpc_port},
            "control-plane": {
                "registry": settings.control_plane.port,
                "metrics": settings.control_plane.metrics_port,
            },
        }
        worker = {
            "grpc": settings.worker.port,
            "metrics": settings.worker.metrics_port,
            "transfer": settings.transfer.port,
        }
        if follows(pod):
            worker = {"metrics": settings.worker.metrics_port}
        assert ports == listening.get(component(pod), worker)


@pytest.mark.parametrize("case", CASES)
def test_probes_ask_a_port_of_the_container(case: str) -> None:
    for _, pod in processes(case):
        own = container(pod)
        ports = {each["name"]: each["containerPort"] for each in own.get("ports", ())}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            if kind not in own:
                assert not ports
                continue
            probe = own[kind]
            if "httpGet" in probe:
                assert probe["httpGet"]["port"] in ports
                paths = {"/metrics"} if is_worker(pod) else {"/health/live", "/health/ready"}
                assert probe["httpGet"]["path"] in paths
            elif "exec" in probe:  # where the port speaks TLS, which a kubelet does not
                *_, how, address = probe["exec"]["command"][:5]
                port = ports["metrics"] if follows(pod) else ports.get("grpc", ports.get("registry"))
                assert (how, f":{port}" in address) == ("http" if follows(pod) else "grpc", True)
                assert probe["exec"]["command"][-1] in {mount["mountPath"] for mount in own["volumeMounts"]}
            else:
                assert probe["grpc"]["port"] == ports.get("grpc", ports.get("registry"))


def test_what_probes_ask_for_is_served() -> None:
    face = (ROOT / "frontend" / "http_face.py").read_text()
    worker = (ROOT / "engine" / "worker_service.py").read_text()
    pod, _ = started("defaults", "decode")

    for path in ("/health/live", "/health/ready"):
        assert f'app.add_api_route("{path}"' in face
    # A worker that drains lives and is not ready: the two are asked of different services.
    services = {name: container(pod)[name]["grpc"].get("service", "") for name in ("livenessProbe", "readinessProbe")}
    assert services["readinessProbe"] == ""
    assert f'LIVE_SERVICE = "{services["livenessProbe"]}"' in worker


def test_a_pools_own_settings_go_before_those_of_all() -> None:
    _, prefill = started("tuned", "prefill")
    _, decode = started("tuned", "decode")

    assert (prefill.worker.max_running, decode.worker.max_running) == (32, 32)
    assert (prefill.worker.max_batched_tokens, decode.worker.max_batched_tokens) == (8192, None)
    assert started("tuned", "frontend")[1].admission.ttft_slo_s == 1.0


def test_what_the_user_says_of_the_log_goes_before_the_images_environment() -> None:
    for ending in ("frontend", "control-plane", *ROLES):
        assert started("tuned", ending)[1].log.format == "console"
        assert started("defaults", ending)[1].log.format == "json"


@pytest.mark.skipif(not IMAGES.is_dir(), reason="no images in this checkout")
def test_no_setting_in_an_images_environment_goes_before_the_charts() -> None:
    """A variable of an image would win over the settings file, so the chart names each of them or agrees."""
    pods = {"worker": started("defaults", "decode"), "light": started("defaults", "control-plane")}
    for dockerfile in sorted(IMAGES.glob("*.Dockerfile")):
        pod, settings = pods["worker" if "worker" in dockerfile.name else "light"]
        for variable, value in re.findall(r"\b(SLIPSTREAM_\w+)=(\S+)", dockerfile.read_text()):
            if "$" in value or variable in environment(pod):
                continue
            path = variable.removeprefix("SLIPSTREAM_").lower().replace("__", ".")
            section, _, name = path.rpartition(".")
            if name == "host":  # a flag, in every pod
                continue
            assert section, f"{variable} in {dockerfile.name}: the chart must set it"
            assert str(getattr(getattr(settings, section), name)) == value, f"{variable} in {dockerfile.name}"


def test_a_model_is_fetched_before_the_worker_starts_where_it_will_look_for_it() -> None:
    rendered = objects(CASES["prefetched"])
    for role in ROLES:
        pod = next(template for name, template in pod_templates(rendered) if name.endswith(role))
        (first,) = pod["spec"]["initContainers"]
        fetching = {**pod, "spec": {**pod["spec"], "containers": [first]}}

        assert first["command"] + first["args"] == ["slipstream", "prefetch"]
        assert str(loaded(rendered, fetching).model_cache.folder) == "/cache/models"
        assert loaded(rendered, pod).model_cache.folder == loaded(rendered, fetching).model_cache.folder
        assert not any("gpu" in name for name in first["resources"]["limits"])
        assert first["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize(
    ("case", "transport", "backend"),
    [
        ("efa", "nixl", "LIBFABRIC"),
        ("efa-large-groups", "nixl", "LIBFABRIC"),
        ("infiniband", "nixl", "UCX"),
        ("roce", "nixl", "UCX"),
        ("defaults", "auto", "UCX"),
    ],
)
def test_on_a_fast_network_workers_take_nothing_slower(case: str, transport: str, backend: str) -> None:
    for role in ROLES:
        _, settings = started(case, f"{role} (leader)" if "groups" in case else role)
        assert (settings.transfer.transport, settings.transfer.nixl_backend) == (transport, backend)


def test_what_is_written_to_lies_in_a_volume() -> None:
    """The root file system is read-only: homes and caches must be below a mount."""
    for case in CASES:
        for _, pod in processes(case):
            mounts = [each["mountPath"] for each in container(pod)["volumeMounts"] if not each.get("readOnly")]
            for name in {"HOME", "XDG_CACHE_HOME", "HF_HOME"} & environment(pod).keys():
                assert any(environment(pod)[name].startswith(mount) for mount in mounts)
            assert "/tmp" in mounts
            assert not is_worker(pod) or "/dev/shm" in mounts


def test_the_preset_without_gpus_starts_simulated_engines() -> None:
    pod, settings = started("simulated", "decode")

    assert settings.worker.engine == "simulated"
    assert not any("gpu" in name for name in container(pod)["resources"]["limits"])
    assert (
        yaml.safe_load((ROOT / "deploy/helm/slipstream/values-simulated.yaml").read_text())["accelerator"]["count"] == 0
    )
