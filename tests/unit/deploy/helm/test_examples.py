"""deploy/examples/eks-efa: what can be known of it without AWS. Terraform's plan and Karpenter were not run."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import hcl2
import jsonschema
import pytest
import yaml

from tests.unit.deploy.helm.chart import (
    ROLES,
    ROOT,
    Object,
    component,
    container,
    is_worker,
    merged,
    named,
    objects,
    pod_templates,
    preset,
)
from tests.unit.deploy.helm.custom_resources import SCHEMAS
from tests.unit.deploy.helm.test_fabric import EKS_PAGES
from tests.unit.deploy.helm.test_manifests import NEWEST, problems

FOLDER = ROOT / "deploy" / "examples" / "eks-efa"
TERRAFORM = sorted(FOLDER.glob("*.tf"))
# p5en.48xlarge
NODE_CPUS, NODE_GIB, NODE_GPUS, NODE_INTERFACES = 192, 2048, 8, 16
TWO_NODES = ("values-two-nodes.yaml",)
BUILT_IN = {"each", "path", "self", "count"}


def karpenter(kind: str) -> Object:
    (found,) = [each for each in yaml.safe_load_all((FOLDER / "karpenter.yaml").read_text()) if each["kind"] == kind]
    return dict(found)


def example_values(*more: str) -> dict[str, Any]:
    layers = (yaml.safe_load((FOLDER / name).read_text()) for name in ("values.yaml", *more))
    return merged(preset("efa"), *layers)


def worker_pods(*more: str) -> list[Object]:
    return [pod for _, pod in pod_templates(objects(example_values(*more))) if is_worker(pod)]


def unquoted(node: Any) -> Any:
    """As it was meant: the parser keeps the quotes of strings and keys."""
    if isinstance(node, dict):
        return {str(key).strip('"'): unquoted(value) for key, value in node.items() if not str(key).startswith("__")}
    if isinstance(node, list):
        return [unquoted(each) for each in node]
    return node.strip('"') if isinstance(node, str) else node


def blocks(kind: str) -> dict[str, Any]:
    """By name, the blocks of a kind in all files."""
    found: dict[str, Any] = {}
    for path in TERRAFORM:
        with path.open() as file:
            for block in unquoted(hcl2.load(file)).get(kind, []):
                found |= block
    return found


@pytest.mark.parametrize("more", [(), TWO_NODES], ids=["one-node", "two-nodes"])
def test_the_example_values_render_what_api_servers_take(more: tuple[str, ...]) -> None:
    assert problems(objects(example_values(*more)), NEWEST) == []


@pytest.mark.parametrize("kind", ["NodePool", "EC2NodeClass"])
def test_karpenters_objects_fit_their_schemas(kind: str) -> None:
    found = karpenter(kind)

    jsonschema.validate(found, SCHEMAS[found["apiVersion"], kind])


def test_the_node_pool_uses_the_node_class_beside_it() -> None:
    reference, node_class = karpenter("NodePool")["spec"]["template"]["spec"]["nodeClassRef"], karpenter("EC2NodeClass")

    assert reference == {
        "group": node_class["apiVersion"].partition("/")[0],
        "kind": node_class["kind"],
        "name": node_class["metadata"]["name"],
    }


def test_workers_go_onto_the_nodes_of_karpenter_and_of_terraform() -> None:
    template = karpenter("NodePool")["spec"]["template"]
    group = blocks("module")["eks"]["eks_managed_node_groups"]["efa"]
    (taint,) = group["taints"].values()
    terraform_taint = {"key": taint["key"], "value": taint["value"], "effect": "NoSchedule"}

    assert taint["effect"] == "NO_SCHEDULE"
    assert template["spec"]["taints"] == [terraform_taint]
    assert template["metadata"]["labels"] == group["labels"]
    for pod in worker_pods():
        assert pod["spec"]["nodeSelector"].items() <= group["labels"].items()
        assert any(
            each["key"] == taint["key"] and each["operator"] == "Exists" and each["effect"] == "NoSchedule"
            for each in pod["spec"]["tolerations"]
        )


def test_the_other_pods_go_onto_nodes_without_gpus() -> None:
    labels = blocks("module")["eks"]["eks_managed_node_groups"]["general"]["labels"]

    for _, pod in pod_templates(objects(example_values())):
        if component(pod) in ("frontend", "control-plane"):
            assert pod["spec"]["nodeSelector"].items() <= labels.items()


@pytest.mark.parametrize(("more", "pods"), [((), 8), (TWO_NODES, 1)], ids=["one-node", "two-nodes"])
def test_so_many_pods_take_the_gpus_of_a_node_and_fit_on_it(more: tuple[str, ...], pods: int) -> None:
    for pod in worker_pods(*more):
        requests, limits = container(pod)["resources"]["requests"], container(pod)["resources"]["limits"]
        huge_mib = int(requests["hugepages-2Mi"].removesuffix("Mi"))
        assert pods * int(requests["nvidia.com/gpu"]) == NODE_GPUS
        assert pods * int(requests["vpc.amazonaws.com/efa"]) <= NODE_INTERFACES
        assert pods * int(requests["cpu"]) < NODE_CPUS
        assert pods * huge_mib <= EKS_PAGES * 2
        assert pods * (int(limits["memory"].removesuffix("Gi")) + huge_mib / 1024) < 0.95 * NODE_GIB
        # /dev/shm counts as memory of the pod.
        (shm,) = [each["emptyDir"]["sizeLimit"] for each in pod["spec"]["volumes"] if each["name"] == "shm"]
        assert int(shm.removesuffix("Gi")) < int(limits["memory"].removesuffix("Gi"))


def test_a_node_waits_for_its_workers_to_end() -> None:
    minutes = re.fullmatch(r"(\d+)m", karpenter("NodePool")["spec"]["template"]["spec"]["terminationGracePeriod"])

    assert minutes is not None
    assert all(int(minutes[1]) * 60 > pod["spec"]["terminationGracePeriodSeconds"] for pod in worker_pods())


def test_karpenter_takes_away_only_what_is_empty() -> None:
    assert karpenter("NodePool")["spec"]["disruption"]["consolidationPolicy"] == "WhenEmpty"
    assert karpenter("NodePool")["spec"]["template"]["spec"]["expireAfter"] == "Never"


def test_karpenter_finds_the_role_networks_and_security_group_that_terraform_makes() -> None:
    modules, node_class = blocks("module"), karpenter("EC2NodeClass")["spec"]
    name = blocks("variable")["name"]["default"]

    def filled(text: str) -> str:
        return text.replace("${var.name}", name)

    assert node_class["role"] == filled(modules["karpenter"]["node_iam_role_name"])
    discovery = {"karpenter.sh/discovery": name}
    for terms in (node_class["subnetSelectorTerms"], node_class["securityGroupSelectorTerms"]):
        assert [each["tags"] for each in terms] == [discovery]
    for tags in (modules["vpc"]["private_subnet_tags"], modules["eks"]["node_security_group_tags"]):
        assert discovery.items() <= {key: filled(value) for key, value in tags.items()}.items()


def test_efa_traffic_within_the_security_group_is_let_in_and_out() -> None:
    rules = blocks("module")["eks"]["node_security_group_additional_rules"].values()

    assert {(rule["type"], rule["protocol"], rule["self"]) for rule in rules} == {
        ("ingress", "-1", True),
        ("egress", "-1", True),
    }


def test_local_disks_of_nodes_are_what_the_model_cache_lies_on() -> None:
    group = blocks("module")["eks"]["eks_managed_node_groups"]["efa"]
    text = (FOLDER / "cluster.tf").read_text()
    document = re.search(r"<<-EOT\n(.*?)\n\s*EOT", text, re.DOTALL)

    assert document is not None
    assert group["cloudinit_pre_nodeadm"][0]["content_type"] == "application/node.eks.aws"
    config = yaml.safe_load(textwrap.dedent(document[1]))
    assert (config["kind"], config["apiVersion"]) == ("NodeConfig", "node.eks.aws/v1alpha1")
    assert config["spec"]["instance"]["localStorage"]["strategy"] == "RAID0"
    assert karpenter("EC2NodeClass")["spec"]["instanceStorePolicy"] == "RAID0"
    assert all(
        "emptyDir" in volume for pod in worker_pods() for volume in pod["spec"]["volumes"] if volume["name"] == "cache"
    )


def test_terraforms_references_lead_somewhere_and_no_variable_is_idle() -> None:
    text = "\n".join(path.read_text() for path in TERRAFORM)
    variables, modules = blocks("variable"), blocks("module")
    names = {name for path in TERRAFORM for block in unquoted(_load(path)).get("locals", []) for name in block}

    assert set(re.findall(r"\bvar\.(\w+)", text)) == variables.keys()
    assert set(re.findall(r"\blocal\.(\w+)", text)) == names
    assert set(re.findall(r"\bmodule\.(\w+)\.", text)) <= modules.keys()
    assert all({"description", "type"} <= variable.keys() for variable in variables.values())
    assert all("description" in output for output in blocks("output").values())


def _load(path: Path) -> Any:
    with path.open() as file:
        return hcl2.load(file)


def test_every_module_and_provider_is_held_to_a_version() -> None:
    (requirements,) = unquoted(_load(FOLDER / "versions.tf"))["terraform"]

    assert all(re.match(r"~> \d+\.\d+", module["version"]) for module in blocks("module").values())
    (providers,) = requirements["required_providers"]
    assert all("version" in provider for provider in providers.values())


def test_gpu_nodes_are_in_the_zone_that_was_chosen() -> None:
    module = blocks("module")

    assert module["eks"]["eks_managed_node_groups"]["efa"]["subnet_ids"] == ["${module.vpc.private_subnets[0]}"]
    assert "zones = concat([var.zone], var.other_zones)" in (FOLDER / "network.tf").read_text()
    assert module["vpc"]["azs"] == "${local.zones}"


@pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not on this machine")
def test_terraform_would_not_format_it_otherwise() -> None:
    subprocess.run(["terraform", "fmt", "-check", "-diff", str(FOLDER)], check=True, timeout=60)


def test_both_pools_may_grow_within_what_karpenter_may_start() -> None:
    for more in ((), TWO_NODES):
        values = example_values(*more)
        pods = sum(values["scaling"][role]["max"] * values[role].get("groupSize", 1) for role in ROLES)
        gpus = pods * values.get("accelerator", {"count": 1})["count"]
        assert gpus <= karpenter("NodePool")["spec"]["limits"]["nvidia.com/gpu"]


def test_a_worker_of_two_nodes_has_the_gpus_of_both() -> None:
    rendered = objects(example_values(*TWO_NODES))
    data = named(rendered, "ConfigMap", "demo-slipstream")["data"]

    for role in ROLES:
        assert yaml.safe_load(data[f"{role}.yaml"])["worker"]["tensor_parallel_size"] == 2 * NODE_GPUS
        assert named(rendered, "LeaderWorkerSet", f"-{role}")["spec"]["leaderWorkerTemplate"]["size"] == 2
