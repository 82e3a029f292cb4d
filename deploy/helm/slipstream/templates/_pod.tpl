{{/* What pods of all components have in common. */}}

{{/* Metadata of a pod. Call with (list $ component values configuration-file-text [one-more-label]). */}}
{{- define "slipstream.podMetadata" -}}
{{- $root := index . 0 -}}
{{- $values := index . 2 -}}
labels:
  {{- include "slipstream.labels" (list $root (index . 1)) | nindent 2 }}
  {{- if has (index . 1) (list "prefill" "decode") }}
  {{- include "slipstream.poolLabels" (list $root (index . 1)) | nindent 2 }}
  {{- end }}
  {{- if gt (len .) 4 }}
  {{- with index . 4 }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- end }}
  {{- with $values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  # Settings are read at the start: pods are replaced when they change.
  checksum/config: {{ index . 3 | sha256sum }}
  kubectl.kubernetes.io/default-container: slipstream
  {{- with $values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Call with (list $ service-account-kind values grace-seconds). */}}
{{- define "slipstream.podCommon" -}}
{{- $root := index . 0 -}}
{{- $values := index . 2 -}}
serviceAccountName: {{ include "slipstream.serviceAccount" (list $root (index . 1)) }}
automountServiceAccountToken: {{ and (eq (index . 1) "controlPlane") (eq $root.Values.scaling.mode "planner") }}
enableServiceLinks: false
terminationGracePeriodSeconds: {{ index . 3 }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ $root.Values.podSecurity.runAsUser }}
  runAsGroup: {{ $root.Values.podSecurity.runAsGroup }}
  fsGroup: {{ $root.Values.podSecurity.fsGroup }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "slipstream.plainSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Environment of every process: caches are in volumes, since the root file system is read-only.
     Two settings are among it, since the images have them in their environments, which go before files.
     Call with (list $ configuration-file more-variables); later ones win, and none is named twice. */}}
{{- define "slipstream.env" -}}
{{- $root := index . 0 -}}
{{- $own := dict
  "SLIPSTREAM_CONFIG" (printf "/etc/slipstream/%s" (index . 1))
  "HOME" "/tmp"
  "XDG_CACHE_HOME" "/cache"
  "HF_HOME" "/cache/huggingface"
  "PYTHONUNBUFFERED" "1"
  "SLIPSTREAM_LOG__FORMAT" (dig "log" "format" "json" $root.Values.config)
  "SLIPSTREAM_DEVICE" (dig "device" "auto" $root.Values.config)
-}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
{{- with $root.Values.model.tokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- range $name, $value := mergeOverwrite $own (index . 2) }}
- {name: {{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end }}

{{- define "slipstream.grace" -}}
{{- /* Call with the values of a component: preStop, drain, and what it takes to end after that. */ -}}
{{- add .preStopSeconds .drainSeconds 15 -}}
{{- end }}

{{- define "slipstream.preStop" -}}
{{- if gt (int .preStopSeconds) 0 }}
lifecycle:
  preStop: {sleep: {seconds: {{ .preStopSeconds }}}}
{{- end }}
{{- end }}
