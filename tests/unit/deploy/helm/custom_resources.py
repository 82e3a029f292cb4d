"""JSON Schemas of the custom resources that the chart and the examples use, as narrow as that use.

Written down after the CRDs of LeaderWorkerSet 0.10, Prometheus operator 0.93, cert-manager 1.19, KEDA 2.20, and
Karpenter's AWS provider 1.14: only the fields that occur here, each with the type and the limits that it has there. A
field that is missing is a field that the API server would have to be asked about.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
FLAG: Schema = {"type": "boolean"}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
INT_OR_PERCENT: Schema = {"anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}
# Go's durations, as the Prometheus operator and Karpenter take them.
DURATION: Schema = {"type": "string", "pattern": "^(([0-9]+(ms|[smhdwy]))+|Never)$"}
# Validated apart, as a Pod.
POD_TEMPLATE: Schema = {"type": "object", "required": ["metadata", "spec"]}


def closed(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


def listed(items: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": at_least}


def one_of(*choices: str) -> Schema:
    return {"type": "string", "enum": list(choices)}


def resource(spec: Schema, *, namespaced: bool = True) -> Schema:
    metadata = closed(
        ("name", "namespace") if namespaced else ("name",),
        name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"},
        **({"namespace": TEXT} if namespaced else {}),
        labels=LABELS,
        annotations=LABELS,
    )
    return closed(("apiVersion", "kind", "metadata", "spec"), apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)


SELECTOR = closed(
    matchLabels=LABELS,
    matchExpressions=listed(
        closed(
            ("key", "operator"), key=TEXT, operator=one_of("In", "NotIn", "Exists", "DoesNotExist"), values=listed(TEXT)
        )
    ),
)

LEADER_WORKER_SET = resource(
    closed(
        ("leaderWorkerTemplate",),
        replicas=COUNT,
        startupPolicy=one_of("LeaderCreated", "LeaderReady"),
        rolloutStrategy=closed(
            ("type",),
            type=one_of("RollingUpdate"),
            rollingUpdateConfiguration=closed(maxSurge=INT_OR_PERCENT, maxUnavailable=INT_OR_PERCENT),
        ),
        leaderWorkerTemplate=closed(
            ("workerTemplate",),
            size={"type": "integer", "minimum": 1},
            restartPolicy=one_of("RecreateGroupOnPodRestart", "None"),
            leaderTemplate=POD_TEMPLATE,
            workerTemplate=POD_TEMPLATE,
        ),
    )
)

_SECRET_KEY = closed(("name", "key"), name=TEXT, key=TEXT)
_ENDPOINT = closed(
    ("port",),
    port=TEXT,
    path=TEXT,
    interval=DURATION,
    honorLabels=FLAG,
    scheme=one_of("http", "https"),
    tlsConfig=closed(
        serverName=TEXT,
        ca=closed(("secret",), secret=_SECRET_KEY),
        cert=closed(("secret",), secret=_SECRET_KEY),
        keySecret=_SECRET_KEY,
    ),
)
CERTIFICATE = resource(
    closed(
        ("secretName", "issuerRef"),
        secretName=TEXT,
        duration=DURATION,
        renewBefore=DURATION,
        privateKey=closed(
            algorithm=one_of("RSA", "ECDSA", "Ed25519"), size=COUNT, rotationPolicy=one_of("Never", "Always")
        ),
        usages=listed(one_of("digital signature", "key encipherment", "server auth", "client auth"), 1),
        uris=listed(TEXT, 1),
        dnsNames=listed(TEXT, 1),
        issuerRef=closed(("name",), name=TEXT, kind=one_of("Issuer", "ClusterIssuer"), group=TEXT),
    )
)
SERVICE_MONITOR = resource(closed(("selector", "endpoints"), selector=SELECTOR, endpoints=listed(_ENDPOINT, 1)))
POD_MONITOR = resource(
    closed(("selector", "podMetricsEndpoints"), selector=SELECTOR, podMetricsEndpoints=listed(_ENDPOINT, 1))
)
PROMETHEUS_RULE = resource(
    closed(
        groups=listed(
            closed(
                ("name", "rules"),
                name=TEXT,
                rules=listed(
                    closed(
                        ("alert", "expr"), alert=TEXT, expr=TEXT, labels=LABELS, annotations=LABELS, **{"for": DURATION}
                    )
                ),
            )
        )
    )
)

SCALED_OBJECT = resource(
    closed(
        ("scaleTargetRef", "triggers"),
        scaleTargetRef=closed(("name",), apiVersion=TEXT, kind=TEXT, name=TEXT),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        fallback=closed(
            ("failureThreshold", "replicas"),
            failureThreshold=COUNT,
            replicas=COUNT,
            behavior=one_of("static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"),
        ),
        advanced=closed(
            # Kubernetes' own: checked where it is the HorizontalPodAutoscaler's.
            horizontalPodAutoscalerConfig=closed(behavior={"type": "object"}),
        ),
        triggers=listed(
            closed(
                ("type", "metadata"),
                type=one_of("prometheus"),
                metricType=one_of("AverageValue", "Value", "Utilization"),
                metadata=LABELS,
            ),
            1,
        ),
    )
)

_TAINT = closed(
    ("key", "effect"), key=TEXT, value={"type": "string"}, effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute")
)
_REQUIREMENT = closed(
    ("key", "operator"),
    key=TEXT,
    operator=one_of("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt", "Gte", "Lte"),
    values=listed({"type": "string"}),
    minValues={"type": "integer", "minimum": 1, "maximum": 50},
)
NODE_POOL = resource(
    closed(
        ("template",),
        template=closed(
            ("spec",),
            metadata=closed(labels=LABELS, annotations=LABELS),
            spec=closed(
                ("nodeClassRef", "requirements"),
                nodeClassRef=closed(("group", "kind", "name"), group=TEXT, kind=TEXT, name=TEXT),
                requirements={**listed(_REQUIREMENT), "maxItems": 100},
                taints=listed(_TAINT),
                startupTaints=listed(_TAINT),
                expireAfter=DURATION,
                terminationGracePeriod=DURATION,
            ),
        ),
        disruption=closed(
            ("consolidateAfter",),
            consolidateAfter=DURATION,
            consolidationPolicy=one_of("WhenEmpty", "WhenEmptyOrUnderutilized", "Balanced"),
            budgets={
                **listed(
                    closed(
                        ("nodes",),
                        nodes={"type": "string", "pattern": "^((100|[0-9]{1,2})%|[0-9]+)$"},
                        reasons=listed(one_of("Underutilized", "Empty", "Drifted")),
                        schedule=TEXT,
                        duration=DURATION,
                    )
                ),
                "maxItems": 50,
            },
        ),
        limits={"type": "object", "additionalProperties": {"type": ["integer", "string"]}},
        weight={"type": "integer", "minimum": 1, "maximum": 100},
    ),
    namespaced=False,
)
_SELECTOR_TERMS = {
    **listed(closed(tags=LABELS, id=TEXT, name=TEXT, alias={"type": "string", "pattern": "^[a-zA-Z0-9]+@.+$"}), 1),
    "maxItems": 30,
}
EC2_NODE_CLASS = resource(
    closed(
        ("amiSelectorTerms", "securityGroupSelectorTerms", "subnetSelectorTerms"),
        amiFamily=one_of("AL2", "AL2023", "Bottlerocket", "Custom", "Windows2019", "Windows2022", "Windows2025"),
        amiSelectorTerms=_SELECTOR_TERMS,
        securityGroupSelectorTerms=_SELECTOR_TERMS,
        subnetSelectorTerms=_SELECTOR_TERMS,
        capacityReservationSelectorTerms=_SELECTOR_TERMS,
        role=TEXT,
        tags=LABELS,
        instanceStorePolicy=one_of("RAID0"),
        placementGroupSelector=closed(name=TEXT, id=TEXT),
        userData=TEXT,
        blockDeviceMappings=listed(
            closed(
                deviceName=TEXT,
                rootVolume=FLAG,
                ebs=closed(
                    volumeSize={"type": "string", "pattern": "^[0-9]+(Gi?|Ti?)$"},
                    volumeType=one_of("gp2", "gp3", "io1", "io2", "sc1", "st1", "standard"),
                    encrypted=FLAG,
                    deleteOnTermination=FLAG,
                ),
            )
        ),
        metadataOptions=closed(
            httpEndpoint=one_of("enabled", "disabled"),
            httpTokens=one_of("required", "optional"),
            httpPutResponseHopLimit={"type": "integer", "minimum": 1, "maximum": 64},
        ),
        kubelet={"type": "object"},
    ),
    namespaced=False,
)

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): LEADER_WORKER_SET,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): SERVICE_MONITOR,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PROMETHEUS_RULE,
    ("cert-manager.io/v1", "Certificate"): CERTIFICATE,
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
    ("karpenter.sh/v1", "NodePool"): NODE_POOL,
    ("karpenter.k8s.aws/v1", "EC2NodeClass"): EC2_NODE_CLASS,
}
