{{/* What one value demands of another, and JSON Schema cannot say. Included once, by the settings' template. */}}

{{- define "slipstream.checks" -}}
{{- $values := .Values -}}
{{- range $role := list "prefill" "decode" }}
{{- $pool := index $values $role }}
{{- if and (gt (int $pool.groupSize) 1) (ne $pool.workload "LeaderWorkerSet") }}
{{- fail (printf "%s.groupSize: more than 1 needs %s.workload: LeaderWorkerSet" $role $role) }}
{{- end }}
{{- if include "slipstream.isGroup" $pool }}
{{- if eq (dig "worker" "engine" (dig "worker" "engine" "" $values.config) $pool.config) "simulated" }}
{{- fail (printf "%s.groupSize: a simulated engine is one process, with nothing to share out among %d pods; take 1, or the engine vllm" $role (int $pool.groupSize)) }}
{{- end }}
{{- if and (ne $values.placement.groups.policy "prefer") (not $values.placement.groups.topologyKey) }}
{{- fail (printf "placement.groups.topologyKey: which label of nodes names the domain that a group's pods share (placement.groups.policy is %s)?" $values.placement.groups.policy) }}
{{- end }}
{{- end }}
{{- if and (ne $values.fabric.kind "tcp") $values.fabric.resource (eq (int $pool.fabricDevices) 0) }}
{{- fail (printf "%s.fabricDevices: fabric.kind is %s, but these pods would get none of %s and go over TCP" $role $values.fabric.kind $values.fabric.resource) }}
{{- end }}
{{- if and (gt (int $pool.fabricDevices) 0) (not $values.fabric.resource) }}
{{- fail (printf "%s.fabricDevices: of which resource? Set fabric.resource" $role) }}
{{- end }}
{{- if lt (int (include "slipstream.grace" $values.frontend)) (int (include "slipstream.grace" $pool)) }}
{{- fail (printf "frontend.drainSeconds: frontends must not end before the workers whose answers they carry; raise it to %d or more" (int (sub (add $pool.preStopSeconds $pool.drainSeconds) $values.frontend.preStopSeconds))) }}
{{- end }}
{{- with index $values.scaling $role }}
{{- if gt (int .min) (int .max) }}
{{- fail (printf "scaling.%s.min: %d is more than max: %d" $role (int .min) (int .max)) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $values.clusterToken.value $values.clusterToken.existingSecret }}
{{- fail "clusterToken.value: clusterToken.existingSecret is set too; which of them is it?" }}
{{- end }}
{{- if gt (int $values.frontend.autoscaling.minReplicas) (int $values.frontend.autoscaling.maxReplicas) }}
{{- fail "frontend.autoscaling.minReplicas: more than maxReplicas" }}
{{- end }}
{{- if and (hasPrefix "/" $values.model.name) (not $values.model.cache.sharedWithFrontends) }}
{{- fail "model.cache.sharedWithFrontends: model.name is a folder, and frontends read its tokenizer: set it to true" }}
{{- end }}
{{- if and (hasPrefix "/" $values.model.name) (eq $values.model.cache.type "emptyDir") }}
{{- fail "model.cache.type: model.name is a folder, which an emptyDir does not hold; take persistentVolumeClaim or hostPath" }}
{{- end }}
{{- end }}
