"""The chart, rendered: by the Helm that `helm-python-sdk` carries, without a cluster."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support import helm

ROOT = Path(__file__).resolve().parents[4]
CHART = ROOT / "deploy" / "helm" / "slipstream"
RELEASE, NAMESPACE = "demo", "llm"

Object = dict[str, Any]
Values = Mapping[str, Any]

BASE: Values = {"model": {"name": "org/model"}}
ROLES = ("prefill", "decode")


def merged(*layers: Values) -> dict[str, Any]:
    """As Helm merges values: mappings by key, everything else replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            before = result.get(name)
            both = isinstance(value, Mapping) and isinstance(before, Mapping)
            result[name] = merged(before, value) if both else value  # type: ignore[arg-type]
    return result


def preset(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / f"values-{name}.yaml").read_text())
    return values


def pools(**values: Any) -> dict[str, Any]:
    """The same for both pools."""
    return dict.fromkeys(ROLES, values)


# The pure Python one takes most of the time of these tests.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_GROUPS = {"workload": "LeaderWorkerSet"}
_LARGE_GROUPS = _GROUPS | {"groupSize": 2}
_RACK = "topology.k8s.aws/network-node-layer-3"
_CLIENTS = [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]
_PROMETHEUS = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "efa": preset("efa"),
    "infiniband": preset("infiniband"),
    "roce": preset("roce"),
    "simulated": preset("simulated"),
    "planner": {"scaling": {"mode": "planner"}},
    "planner-taints": {"scaling": {"mode": "planner"}, "config": {"kubernetes": {"taint_nodes": True}}},
    "planner-groups": {"scaling": {"mode": "planner"}, "planner": {"dryRun": True}, **pools(**_GROUPS)},
    "hpa": {"scaling": {"mode": "hpa"}, "frontend": {"autoscaling": {"enabled": True}}},
    "keda": {"scaling": {"mode": "keda"}},
    "keda-groups": {"scaling": {"mode": "keda"}, **pools(**_GROUPS)},
    "groups": pools(**_GROUPS),
    "efa-large-groups": merged(
        preset("efa"),
        {"accelerator": {"count": 8}, "placement": {"groups": {"policy": "exclusive", "topologyKey": _RACK}}},
        pools(**_LARGE_GROUPS),
    ),
    "large-groups": merged(
        {
            "scaling": {"mode": "planner", "prefill": {"max": 4}, "decode": {"max": 3}},
            "accelerator": {"count": 4},
            "placement": {"near": [_RACK]},
            "model": {"prefetch": True},
            "monitoring": {"serviceMonitors": True},
        },
        pools(**_LARGE_GROUPS, maxUnavailable="50%"),
        {"prefill": {"groupSize": 1}},
    ),
    "tls-large-groups": merged(
        {
            "tls": {"enabled": True, "certManager": {"issuer": "internal"}},
            "accelerator": {"count": 8, "dra": {"enabled": True}},
            "placement": {"groups": {"policy": "require", "topologyKey": _RACK}},
            "scaling": {"mode": "hpa"},
        },
        pools(**_LARGE_GROUPS),
    ),
    "privileged": merged(preset("efa"), {"fabric": {"privileged": True}}),
    "claims": {"accelerator": {"dra": {"enabled": True, "selectors": ["device.attributes['x'].y == 1"]}}},
    "four-gpus": merged({"scaling": {"mode": "planner"}, "accelerator": {"count": 4}}, preset("efa")),
    "node-cache": {"model": {"cache": {"type": "hostPath"}}},
    "claimed-cache": {
        "model": {
            "name": "/cache/m",
            "servedName": "m",
            "cache": {"type": "persistentVolumeClaim", "sharedWithFrontends": True},
        }
    },
    "prefetched": {"model": {"prefetch": True, "cache": {"type": "hostPath"}}},
    "existing-claim": {"model": {"cache": {"type": "persistentVolumeClaim", "existingClaim": "models"}}},
    "watched": {"monitoring": {"serviceMonitors": True, "rules": True, "dashboards": True, "labels": {"team": "a"}}},
    "closed": {
        "networkPolicy": {
            "clients": _CLIENTS,
            "monitoring": _PROMETHEUS,
            "download": False,
            "egress": [{"ports": [{"port": 3128, "protocol": "TCP"}]}],
        },
        "config": {"tracing": {"endpoint": "http://collector.tracing.svc:4317/"}},
    },
    "tls": {
        "tls": {"enabled": True, "certManager": {"issuer": "internal"}, "faceHosts": ["llm.example.com"]},
        "monitoring": {"serviceMonitors": True},
    },
    "own-certificates": {"tls": {"enabled": True, "certManager": {"enabled": False}, "secrets": {"worker": "mine"}}},
    "own-token": {"clusterToken": {"existingSecret": "mine"}},
    "open": {"networkPolicy": {"enabled": False}, "placement": {"sameZone": False, "rolesApart": False}},
    "own-names": {
        "fullnameOverride": "llm",
        "nameOverride": "serving",
        "serviceAccounts": {"create": False, "frontend": "a", "controlPlane": "b", "worker": "c"},
        "images": {"worker": {"digest": "sha256:" + "0" * 64}, "pullSecrets": [{"name": "registry"}]},
        "model": {"tokenSecret": {"name": "hub"}},
    },
    "tuned": {
        "listenAddress": "::",
        "config": {"log": {"format": "console"}, "worker": {"max_running": 32}, "admission": {"ttft_slo_s": 1.0}},
        "prefill": {
            "config": {"worker": {"max_batched_tokens": 8192}},
            "preStopSeconds": 5,
            "drainSeconds": 30,
            "startSeconds": 7200,
            "maxUnavailable": "50%",
            "maxSurge": 1,
            "podLabels": {"team": "a"},
            "nodeSelector": {"pool": "p5"},
            "priorityClassName": "high",
            "env": {"VLLM_LOGGING_LEVEL": "INFO"},
        },
        "frontend": {"workers": 4, "podAnnotations": {"a": "b"}, "service": {"type": "LoadBalancer", "httpPort": 80}},
        "placement": {"near": ["topology.k8s.aws/network-node-layer-3", "nvidia.com/gpu.clique"], "spread": False},
    },
}


def texts(values: Values, kubeconfig: Path | None = None) -> dict[str, str]:
    """Every template's text by its name, NOTES.txt too.

    Args:
        kubeconfig: of an API server to look into, as an upgrade does.

    Raises:
        RefusedError: the values are refused, by the schema or by a template.
    """
    rendered = helm.render(CHART, merged(BASE, values), name=RELEASE, namespace=NAMESPACE, kubeconfig=kubeconfig)
    return {name.rpartition("templates/")[2]: text for name, text in rendered.items()}


@functools.lru_cache(maxsize=256)
def _objects(values: str) -> tuple[Object, ...]:
    found: list[Object] = []
    for name, text in texts(json.loads(values)).items():
        if not name.endswith(".txt"):
            found += [each for each in yaml.load_all(text, Loader=_LOADER) if each]
    return tuple(found)


def objects(values: Values) -> list[Object]:
    """All that would be sent to the API server. Shared between tests: not to be changed."""
    return list(_objects(json.dumps(values, sort_keys=True)))


def own_objects(values: Values) -> list[Object]:
    """The same, to be changed."""
    return copy.deepcopy(objects(values))


def of_kind(rendered: list[Object], *kinds: str) -> list[Object]:
    return [each for each in rendered if each["kind"] in kinds]


def named(rendered: list[Object], kind: str, ending: str = "") -> Object:
    """The one of that kind whose name ends so."""
    found = [each for each in of_kind(rendered, kind) if each["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, f"{kind} {ending}: {[each['metadata']['name'] for each in found]}"
    return found[0]


def pod_templates(rendered: list[Object]) -> Iterator[tuple[str, Object]]:
    """Each pod that some object would make, with where it is from."""
    for each in rendered:
        name, spec = each["metadata"]["name"], each.get("spec", {})
        if each["kind"] == "Deployment":
            yield name, spec["template"]
        elif each["kind"] == "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            yield f"{name} (leader)", group["leaderTemplate"]
            yield f"{name} (follower)", group["workerTemplate"]
        elif each["kind"] == "Pod":
            yield name, each


def component(pod: Object) -> str:
    label: str = pod["metadata"]["labels"]["app.kubernetes.io/component"]
    return label


def is_worker(pod: Object) -> bool:
    return component(pod) in ROLES


def follows(pod: Object) -> bool:
    """Whether it is of a group that another pod leads."""
    return bool(pod["metadata"]["labels"].get("slipstream.dev/member") == "follower")


def container(pod: Object) -> Object:
    (only,) = pod["spec"]["containers"]
    return dict(only)


def environment(pod: Object) -> dict[str, str]:
    """Its variables; what Kubernetes fills in stands as $(NAME)."""
    return {each["name"]: each.get("value", f"$({each['name']})") for each in container(pod)["env"]}


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels."""
    if any(labels.get(name) != value for name, value in selector.get("matchLabels", {}).items()):
        return False
    for one in selector.get("matchExpressions", ()):
        has, value = one["key"] in labels, labels.get(one["key"])
        fits = {
            "In": value in one.get("values", ()),
            "NotIn": value not in one.get("values", ()),
            "Exists": has,
            "DoesNotExist": not has,
        }
        if not fits[one["operator"]]:
            return False
    return True
