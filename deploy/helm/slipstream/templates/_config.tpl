{{/* The settings files, one for each component: the user's `config`, a pool's own over it, and what the chart decides. */}}

{{- define "slipstream.modelConfig" -}}
{{ include "slipstream.securityConfig" . }}
model: {{ required "model.name: a Hugging Face id, or a folder in the model cache, is needed" .Values.model.name | quote }}
{{- with .Values.model.servedName }}
served_model_name: {{ . | quote }}
{{- end }}
control_plane:
  address: {{ include "slipstream.controlPlaneAddress" . }}
{{- end }}

{{- define "slipstream.frontendConfig" -}}
{{- $own := dict "frontend" (dict
  "http_port" 8000 "grpc_port" 8001
  "workers" (int .Values.frontend.workers) "drain_timeout_s" (int .Values.frontend.drainSeconds)) -}}
{{- /* A pod has to listen where others reach it: without keys it is the network policy that says who does. */ -}}
{{- $keys := .Values.frontend.keys -}}
{{- $_ := set $own "security" (ternary (dict "anonymous" true) (dict "keys_file" (printf "/etc/slipstream-keys/%s" $keys.key)) (empty $keys.secret)) -}}
{{- if .Values.tls.enabled -}}
{{- $_ := set $own "security" (mergeOverwrite $own.security (dict
  "face_certificate_file" "/etc/slipstream-face/tls.crt" "face_key_file" "/etc/slipstream-face/tls.key")) -}}
{{- end -}}
{{- mergeOverwrite (deepCopy .Values.config) (include "slipstream.modelConfig" . | fromYaml) $own | toYaml -}}
{{- end }}

{{- define "slipstream.controlPlaneConfig" -}}
{{- $own := dict "control_plane" (dict
  "port" 7600 "metrics_port" 7601
  "address" (include "slipstream.controlPlaneAddress" .)) -}}
{{- if eq .Values.scaling.mode "planner" -}}
{{- $_ := set $own "planner" (dict "policy" "/etc/slipstream/policy.yaml" "scaler" "kubernetes" "dry_run" .Values.planner.dryRun) -}}
{{- $_ := set $own "kubernetes" (dict
  "namespace" .Release.Namespace
  "selector" (include "slipstream.poolSelector" .)
  "lease" (printf "%s-planner" (include "slipstream.fullname" .))
  "leader_worker_sets" (or (eq .Values.prefill.workload "LeaderWorkerSet") (eq .Values.decode.workload "LeaderWorkerSet"))) -}}
{{- end -}}
{{- mergeOverwrite (deepCopy .Values.config) (include "slipstream.securityConfig" . | fromYaml) $own | toYaml -}}
{{- end }}

{{- define "slipstream.policy" -}}
{{- if .Values.planner.policy -}}
{{- toYaml .Values.planner.policy -}}
{{- else -}}
{{- $scaling := .Values.scaling -}}
{{- $pods := add (mul $scaling.prefill.max .Values.prefill.groupSize) (mul $scaling.decode.max .Values.decode.groupSize) -}}
gpu_budget: {{ mul $pods (max 1 (int .Values.accelerator.count)) }}
models:
  - model: {{ include "slipstream.servedName" . | quote }}
    objectives:
      realtime: {ttft_s: {{ float64 .Values.planner.ttftSeconds }}, itl_s: {{ float64 .Values.planner.itlSeconds }}, percentile: 90.0}
    bounds: {min_prefill: {{ $scaling.prefill.min }}, min_decode: {{ $scaling.decode.min }}}
{{- end -}}
{{- end }}

{{/* Call with (list $ "prefill" | "decode"). */}}
{{- define "slipstream.workerConfig" -}}
{{- $root := index . 0 -}}
{{- $pool := index $root.Values (index . 1) -}}
{{- $fabric := dict -}}
{{- if ne $root.Values.fabric.kind "tcp" -}}
{{- /* RDMA is NIXL's work: a worker whose image lacks it shall not start, where `auto` would take TCP. */ -}}
{{- $fabric = dict "transfer" (dict "transport" "nixl" "nixl_backend" (ternary "LIBFABRIC" "UCX" (eq $root.Values.fabric.kind "efa"))) -}}
{{- end -}}
{{- if and $root.Values.model.prefetch (not (hasPrefix "/" $root.Values.model.name)) -}}
{{- $_ := set $fabric "model_cache" (dict "folder" "/cache/models") -}}
{{- end -}}
{{- $own := dict "worker" (dict
  "port" 7700 "metrics_port" 7701
  "start_timeout_s" (int $pool.startSeconds) "drain_timeout_s" (int $pool.drainSeconds)) -}}
{{- if gt (int $root.Values.accelerator.count) 0 -}}
{{- $_ := set $own.worker "tensor_parallel_size" (mul $root.Values.accelerator.count $pool.groupSize) -}}
{{- else if include "slipstream.isGroup" $pool -}}
{{- $_ := set $fabric "worker" (dict "tensor_parallel_size" (int $pool.groupSize)) -}}
{{- end -}}
{{- $own = mergeOverwrite $own (dict "transfer" (dict "port" 7702)) -}}
{{- mergeOverwrite $fabric (deepCopy $root.Values.config) (deepCopy $pool.config) (include "slipstream.modelConfig" $root | fromYaml) $own | toYaml -}}
{{- end }}
