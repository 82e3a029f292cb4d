{{/* How components know each other: by a secret that they share, or by certificates. */}}

{{/* The Secret of a role. Call with (list $ "controlPlane" | "frontend" | "worker" | "operator" | "metrics" | "face"). */}}
{{- define "slipstream.tlsSecret" -}}
{{- $root := index . 0 -}}
{{- default (printf "%s-tls-%s" (include "slipstream.fullname" $root) (kebabcase (index . 1))) (index $root.Values.tls.secrets (index . 1)) -}}
{{- end }}

{{- define "slipstream.tokenSecret" -}}
{{- default (printf "%s-cluster-token" (include "slipstream.fullname" .)) .Values.clusterToken.existingSecret -}}
{{- end }}

{{/* Settings of every component. */}}
{{- define "slipstream.securityConfig" -}}
security:
{{- if .Values.tls.enabled }}
  ca_file: /etc/slipstream-security/ca.crt
  certificate_file: /etc/slipstream-security/tls.crt
  key_file: /etc/slipstream-security/tls.key
{{- else }}
  cluster_token_file: /etc/slipstream-security/token
{{- end }}
{{- end }}

{{/* As a folder: a single file of it (subPath) would never change. */}}
{{- define "slipstream.securityMount" -}}
- {name: security, mountPath: /etc/slipstream-security, readOnly: true}
{{- end }}

{{/* Call with (list $ "controlPlane" | "frontend" | "worker" | "operator"). */}}
{{- define "slipstream.securityVolume" -}}
{{- $root := index . 0 -}}
{{- $secret := include "slipstream.tokenSecret" $root -}}
{{- if $root.Values.tls.enabled -}}
{{- $secret = include "slipstream.tlsSecret" . -}}
{{- end -}}
- {name: security, secret: {secretName: {{ $secret | quote }}, defaultMode: 0440}}
{{- end }}

{{/* What a probe asks. A kubelet speaks no TLS over gRPC: with certificates a command in the container does.
     Call with (list $ port address-in-the-container service). */}}
{{- define "slipstream.grpcProbe" -}}
{{- $root := index . 0 -}}
{{- $port := index . 1 -}}
{{- $service := index . 3 -}}
{{- if $root.Values.tls.enabled -}}
exec:
  command: [python, -I, /opt/slipstream/healthcheck.py, grpc, {{ printf "%s:%d" (index . 2) (int $port) | quote }}, {{ $service | quote }}, /etc/slipstream-security]
{{- else -}}
grpc: {port: {{ $port }}{{ with $service }}, service: {{ . }}{{ end }}}
{{- end }}
{{- end }}

{{/* Of a ServiceMonitor's endpoint. Call with (list $ name-in-the-certificate). */}}
{{- define "slipstream.scrapeTls" -}}
{{- $root := index . 0 -}}
{{- $secret := include "slipstream.tlsSecret" (list $root "metrics") -}}
scheme: https
tlsConfig:
  serverName: {{ index . 1 }}
  ca: {secret: {name: {{ $secret }}, key: ca.crt}}
  cert: {secret: {name: {{ $secret }}, key: tls.crt}}
  keySecret: {name: {{ $secret }}, key: tls.key}
{{- end }}

{{- define "slipstream.faceName" -}}
{{ include "slipstream.fullname" . }}-frontend.{{ .Release.Namespace }}.svc
{{- end }}
