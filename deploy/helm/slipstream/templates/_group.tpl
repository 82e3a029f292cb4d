{{/* Groups: several pods of a LeaderWorkerSet that are one worker. The first of them leads: it registers, and serves. */}}

{{/* Whether a pool's workers are such groups: "yes" or nothing. Call with the pool's values. */}}
{{- define "slipstream.isGroup" -}}
{{- if gt (int .groupSize) 1 -}}
yes
{{- end -}}
{{- end }}

{{/* What tells leaders and followers apart, on the pods of groups. Call with (list pool-values leads). */}}
{{- define "slipstream.memberLabel" -}}
{{- if include "slipstream.isGroup" (index . 0) -}}
slipstream.dev/member: {{ ternary "leader" "follower" (index . 1) }}
{{- end }}
{{- end }}

{{/* The workers that serve: all but followers, which only compute. */}}
{{- define "slipstream.servingSelector" -}}
{{ include "slipstream.workerSelector" . }}
  - {key: slipstream.dev/member, operator: NotIn, values: [follower]}
{{- end }}

{{/* One command line for all pods of a group; LeaderWorkerSet fills in which of them it is. Call with the pool's values. */}}
{{- define "slipstream.groupFlags" -}}
{{- if include "slipstream.isGroup" . -}}
, --nnodes, $(LWS_GROUP_SIZE), --node-rank, $(LWS_WORKER_INDEX), --master-addr, $(LWS_LEADER_ADDRESS)
{{- end }}
{{- end }}

{{/* A pod's own group, as an affinity sees it: LeaderWorkerSet gives all pods of a group the same key.
     Call with (list $ role topology-key). */}}
{{- define "slipstream.ownGroup" -}}
{{- $root := index . 0 -}}
topologyKey: {{ index . 2 }}
labelSelector:
  matchLabels:
    {{- include "slipstream.componentSelector" (list $root (index . 1)) | nindent 4 }}
matchLabelKeys: [leaderworkerset.sigs.k8s.io/group-key]
{{- end }}

{{/* What a probe of a follower asks: it has no gRPC, and its metrics are there as long as it is.
     Call with (list $). */}}
{{- define "slipstream.followerProbe" -}}
{{- $root := index . 0 -}}
{{- $metrics := dig "security" "metrics" "mtls" $root.Values.config -}}
{{- if and $root.Values.tls.enabled (eq $metrics "mtls") -}}
exec:
  command: [python, -I, /opt/slipstream/healthcheck.py, http, "https://$POD_IP:7701/metrics", /etc/slipstream-security]
{{- else -}}
httpGet: {path: /metrics, port: metrics, scheme: {{ ternary "HTTPS" "HTTP" (and $root.Values.tls.enabled (ne $metrics "plain")) }}}
{{- end }}
{{- end }}

{{/* Of a disruption budget, which counts pods: as many as may go so that no more groups go than the value says. One pod
     that is evicted takes its group with it, but not at once. Call with the pool's values. */}}
{{- define "slipstream.podsUnavailable" -}}
{{- $amount := .maxUnavailable -}}
{{- if hasSuffix "%" (toString $amount) -}}
{{ max 1 (div (int (trimSuffix "%" $amount)) (int .groupSize)) }}%
{{- else -}}
{{ $amount }}
{{- end }}
{{- end }}
