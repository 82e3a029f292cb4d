"""Fast networks: every worker pod has the devices, memory and variables, leaders of groups as much as followers."""

from __future__ import annotations

import pytest

from tests.support.helm import RefusedError
from tests.unit.deploy.helm.chart import (
    CASES,
    Object,
    container,
    environment,
    is_worker,
    merged,
    objects,
    pod_templates,
    pools,
    preset,
    texts,
)

FABRICS = ("efa", "infiniband", "roce")
GROUPS = pools(workload="LeaderWorkerSet", groupSize=4)
MIB = 1 << 20
# 2 MiB pages that EKS' accelerated Amazon Linux sets aside, and the GPUs of the nodes with EFA.
EKS_PAGES, GPUS_OF_A_NODE, EFA_OF_P5EN = 5128, 8, 16


def workers(values: dict[str, object]) -> list[tuple[str, Object]]:
    return [(name, pod) for name, pod in pod_templates(objects(values)) if is_worker(pod)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("fabric", FABRICS)
def test_every_worker_pod_has_what_the_fabric_needs(fabric: str, grouped: bool) -> None:
    values = merged(preset(fabric), GROUPS if grouped else {})
    wanted = values["fabric"]
    pods = workers(values)

    assert len(pods) == (4 if grouped else 2)
    for name, pod in pods:
        limits, requests = (container(pod)["resources"][each] for each in ("limits", "requests"))
        assert limits[wanted["resource"]] == requests[wanted["resource"]] >= 1, name
        assert wanted["env"].items() <= environment(pod).items(), name
        assert container(pod)["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"], name
        assert limits["nvidia.com/gpu"] == 1, name
        (shm,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "20Gi"}, name


def test_efa_workers_have_huge_pages_and_the_libraries_of_efa_first() -> None:
    values = merged(preset("efa"), GROUPS)
    for _, pod in workers(values):
        resources = container(pod)["resources"]
        assert resources["limits"]["hugepages-2Mi"] == resources["requests"]["hugepages-2Mi"] == "1280Mi"
        # The API server refuses huge pages without memory or CPU beside them.
        assert {"cpu", "memory"} <= resources["requests"].keys()
        assert environment(pod)["FI_PROVIDER"] == "efa"
        assert environment(pod)["LD_LIBRARY_PATH"].startswith("/opt/amazon/efa/lib")


def test_eight_workers_of_the_efa_preset_fit_on_a_node() -> None:
    values = preset("efa")

    huge_bytes = int(values["fabric"]["hugepages2Mi"].removesuffix("Mi")) * MIB
    assert GPUS_OF_A_NODE * huge_bytes <= EKS_PAGES * 2 * MIB
    assert all(GPUS_OF_A_NODE * values[role]["fabricDevices"] <= EFA_OF_P5EN for role in ("prefill", "decode"))


@pytest.mark.parametrize("case", CASES)
def test_no_list_of_transports_turns_rdma_off(case: str) -> None:
    assert not any("UCX_TLS" in environment(pod) for _, pod in workers(CASES[case]))


@pytest.mark.parametrize("fabric", FABRICS)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_pool_without_the_fabrics_devices_is_refused(fabric: str, role: str) -> None:
    with pytest.raises(RefusedError, match=rf"{role}.fabricDevices: fabric.kind is {fabric}, but these pods"):
        texts(merged(preset(fabric), {role: {"fabricDevices": 0}}))


def test_devices_of_no_resource_are_refused() -> None:
    with pytest.raises(RefusedError, match=r"decode.fabricDevices: of which resource\? Set fabric.resource"):
        texts({"decode": {"fabricDevices": 1}})


def test_with_claims_gpus_come_from_a_claim_and_not_from_the_device_plugin() -> None:
    for _, pod in workers(CASES["claims"]):
        resources = container(pod)["resources"]
        assert "nvidia.com/gpu" not in resources["limits"]
        assert resources["claims"] == [{"name": "gpu"}]
        assert [claim["name"] for claim in pod["spec"]["resourceClaims"]] == ["gpu"]
