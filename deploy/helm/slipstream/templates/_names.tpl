{{/* Names and labels. Pods are found by `app.kubernetes.io/component`: frontend, control-plane, prefill, decode. */}}

{{- define "slipstream.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "slipstream.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "slipstream.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "slipstream.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* What pods are selected by, all components. */}}
{{- define "slipstream.selector" -}}
app.kubernetes.io/name: {{ include "slipstream.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Call with (list $ component). */}}
{{- define "slipstream.componentSelector" -}}
{{- $root := index . 0 -}}
{{ include "slipstream.selector" $root }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "slipstream.workerSelector" -}}
matchLabels:
  {{- include "slipstream.selector" . | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [prefill, decode]}
{{- end }}

{{/* Call with (list $ component). */}}
{{- define "slipstream.labels" -}}
{{- $root := index . 0 -}}
{{ include "slipstream.componentSelector" . }}
app.kubernetes.io/part-of: slipstream
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{- define "slipstream.controlPlaneAddress" -}}
{{ include "slipstream.fullname" . }}-control-plane.{{ .Release.Namespace }}.svc:7600
{{- end }}

{{/* What the planner finds its pools by: Deployments or LeaderWorkerSets, and their pods. Call with (list $ role). */}}
{{- define "slipstream.poolLabels" -}}
slipstream.dev/pool: {{ index . 1 }}
slipstream.dev/role: {{ index . 1 }}
{{- end }}

{{- define "slipstream.poolSelector" -}}
slipstream.dev/pool,app.kubernetes.io/instance={{ .Release.Name }},app.kubernetes.io/name={{ include "slipstream.name" . }}
{{- end }}

{{/* The name that workers register under: what is said, else the model's id, or its folder's last part. */}}
{{- define "slipstream.servedName" -}}
{{- if .Values.model.servedName -}}
{{ .Values.model.servedName }}
{{- else if hasPrefix "/" .Values.model.name -}}
{{ base .Values.model.name }}
{{- else -}}
{{ .Values.model.name }}
{{- end -}}
{{- end }}

{{/* Whether something else than the chart sets the workers' numbers: "yes" or nothing. */}}
{{- define "slipstream.isScaled" -}}
{{- if and (ne .Values.scaling.mode "none") (not (and (eq .Values.scaling.mode "planner") .Values.planner.dryRun)) -}}
yes
{{- end -}}
{{- end }}

{{/* Call with (list $ "frontend" | "controlPlane" | "worker"). */}}
{{- define "slipstream.serviceAccount" -}}
{{- $root := index . 0 -}}
{{- $who := index . 1 -}}
{{- if $root.Values.serviceAccounts.create -}}
{{ include "slipstream.fullname" $root }}-{{ kebabcase $who }}
{{- else -}}
{{ required (printf "serviceAccounts.%s: a name is needed where serviceAccounts.create is false" $who) (index $root.Values.serviceAccounts $who) }}
{{- end -}}
{{- end }}

{{/* Call with (list $ "frontend" | "controlPlane" | "worker"). */}}
{{- define "slipstream.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.images (index . 1) -}}
{{- if $image.digest -}}
image: {{ printf "%s@%s" $image.repository $image.digest | quote }}
{{- else -}}
image: {{ printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) | quote }}
{{- end }}
imagePullPolicy: {{ $image.pullPolicy }}
{{- end }}
