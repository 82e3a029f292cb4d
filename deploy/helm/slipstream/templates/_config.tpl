{{/* The settings files, one for each component: the user's `config`, a pool's own over it, and what the chart decides. */}}

{{- define "slipstream.modelConfig" -}}
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
{{- mergeOverwrite (deepCopy .Values.config) (include "slipstream.modelConfig" . | fromYaml) $own | toYaml -}}
{{- end }}

{{- define "slipstream.controlPlaneConfig" -}}
{{- $own := dict "control_plane" (dict
  "port" 7600 "metrics_port" 7601
  "address" (include "slipstream.controlPlaneAddress" .)) -}}
{{- mergeOverwrite (deepCopy .Values.config) $own | toYaml -}}
{{- end }}

{{/* Call with (list $ "prefill" | "decode"). */}}
{{- define "slipstream.workerConfig" -}}
{{- $root := index . 0 -}}
{{- $pool := index $root.Values (index . 1) -}}
{{- $fabric := dict -}}
{{- if eq $root.Values.fabric.kind "efa" -}}
{{- /* NIXL takes EFA only when it is asked for; `auto` could fall back to TCP without a word. */ -}}
{{- $fabric = dict "transfer" (dict "transport" "nixl" "nixl_backend" "LIBFABRIC") -}}
{{- end -}}
{{- $own := dict "worker" (dict
  "port" 7700 "metrics_port" 7701
  "start_timeout_s" (int $pool.startSeconds) "drain_timeout_s" (int $pool.drainSeconds)) -}}
{{- $own = mergeOverwrite $own (dict "transfer" (dict "port" 7702)) -}}
{{- mergeOverwrite $fabric (deepCopy $root.Values.config) (deepCopy $pool.config) (include "slipstream.modelConfig" $root | fromYaml) $own | toYaml -}}
{{- end }}
