{{/* A worker's pod. Prefill and decode differ by their command; leaders and followers of a group by their probes. */}}

{{- define "slipstream.modelCache" -}}
{{- $cache := .Values.model.cache -}}
- name: cache
  {{- if eq $cache.type "hostPath" }}
  hostPath: {path: {{ $cache.hostPath | quote }}, type: Directory}
  {{- else if eq $cache.type "persistentVolumeClaim" }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "slipstream.fullname" .)) $cache.existingClaim }}
  {{- else }}
  emptyDir: {sizeLimit: {{ $cache.sizeLimit }}}
  {{- end }}
{{- end }}

{{- define "slipstream.workerResources" -}}
{{- /* Call with (list $ pool-values). */ -}}
{{- $root := index . 0 -}}
{{- $pool := index . 1 -}}
{{- $values := $root.Values -}}
{{- $extra := dict -}}
{{- if and (gt (int $values.accelerator.count) 0) (not $values.accelerator.dra.enabled) -}}
{{- $_ := set $extra $values.accelerator.resource (int $values.accelerator.count) -}}
{{- end -}}
{{- if gt (int $pool.fabricDevices) 0 -}}
{{- $_ := set $extra $values.fabric.resource (int $pool.fabricDevices) -}}
{{- end -}}
{{- if $values.fabric.hugepages2Mi -}}
{{- $_ := set $extra "hugepages-2Mi" $values.fabric.hugepages2Mi -}}
{{- end -}}
{{- /* Extended resources and huge pages: the request must be the limit. */ -}}
{{- $all := deepCopy $pool.resources -}}
{{- $all = mergeOverwrite $all (dict "limits" $extra "requests" $extra) -}}
{{- if and (gt (int $values.accelerator.count) 0) $values.accelerator.dra.enabled -}}
{{- $_ := set $all "claims" (list (dict "name" "gpu")) -}}
{{- end -}}
{{- toYaml $all -}}
{{- end }}

{{- define "slipstream.workerAffinity" -}}
{{- /* Call with (list $ role other-role). */ -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $placement := $root.Values.placement -}}
{{- $isGroup := include "slipstream.isGroup" (index $root.Values $role) -}}
{{- $groups := $placement.groups -}}
{{- $required := and $isGroup (eq $groups.policy "require") -}}
{{- $preferred := list -}}
{{- if and $isGroup (eq $groups.policy "prefer") -}}
{{- $preferred = ternary (list $groups.topologyKey) $placement.near (ne $groups.topologyKey "") -}}
{{- end -}}
{{- if or $placement.sameZone $placement.rolesApart $placement.near $required $preferred }}
affinity:
  {{- if or $placement.sameZone $placement.near $required $preferred }}
  podAffinity:
    {{- if or $placement.sameZone $required }}
    requiredDuringSchedulingIgnoredDuringExecution:
      {{- if $placement.sameZone }}
      - topologyKey: topology.kubernetes.io/zone
        labelSelector:
          {{- include "slipstream.workerSelector" $root | nindent 10 }}
      {{- end }}
      {{- if $required }}
      - {{- include "slipstream.ownGroup" (list $root $role $groups.topologyKey) | nindent 8 }}
      {{- end }}
    {{- end }}
    {{- if or $placement.near $preferred }}
    preferredDuringSchedulingIgnoredDuringExecution:
      # A group's pods talk for every token: to be near each other counts more than to be near other workers.
      {{- range $index, $key := $preferred }}
      - weight: {{ sub 100 $index }}
        podAffinityTerm:
          {{- include "slipstream.ownGroup" (list $root $role $key) | nindent 10 }}
      {{- end }}
      {{- range $index, $key := $placement.near }}
      - weight: {{ max 10 (sub 90 (mul $index 20)) }}
        podAffinityTerm:
          topologyKey: {{ $key }}
          labelSelector:
            {{- include "slipstream.workerSelector" $root | nindent 12 }}
      {{- end }}
    {{- end }}
  {{- end }}
  {{- if $placement.rolesApart }}
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 50
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "slipstream.componentSelector" (list $root (index . 2)) | nindent 14 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Call with (list $ role leads): `leads` is false for the followers of a group. */}}
{{- define "slipstream.workerPod" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $leads := index . 2 -}}
{{- $values := $root.Values -}}
{{- $pool := index $values $role -}}
{{- $fabric := $values.fabric -}}
{{- $env := deepCopy $fabric.env -}}
{{- if $fabric.libraryPath -}}
{{- $env = mergeOverwrite $env (dict "LD_LIBRARY_PATH" $fabric.libraryPath) -}}
{{- end -}}
{{- $env = mergeOverwrite $env $pool.env -}}
{{- $alive := include "slipstream.followerProbe" (list $root) -}}
{{- $ready := $alive -}}
{{- if $leads -}}
{{- $alive = include "slipstream.grpcProbe" (list $root 7700 "$POD_IP" "slipstream.v1.Worker") -}}
{{- $ready = include "slipstream.grpcProbe" (list $root 7700 "$POD_IP" "") -}}
{{- end -}}
{{- /* A follower computes until its leader has ended, whichever of them was told to. */ -}}
{{- $grace := add (include "slipstream.grace" $pool) (ternary 0 15 $leads) -}}
{{- include "slipstream.podCommon" (list $root "worker" $pool $grace) }}
{{- include "slipstream.workerAffinity" (list $root $role (ternary "decode" "prefill" (eq $role "prefill"))) }}
{{- if $values.placement.spread }}
topologySpreadConstraints:
  - topologyKey: kubernetes.io/hostname
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "slipstream.componentSelector" (list $root $role) | nindent 8 }}
{{- end }}
{{- if and (gt (int $values.accelerator.count) 0) $values.accelerator.dra.enabled }}
resourceClaims:
  - {name: gpu, resourceClaimTemplateName: {{ include "slipstream.fullname" $root }}-gpu}
{{- end }}
{{- if $values.model.prefetch }}
initContainers:
  - name: prefetch
    {{- include "slipstream.image" (list $root "worker") | nindent 4 }}
    command: [slipstream]
    args: [prefetch]
    env:
      {{- include "slipstream.env" (list $root (printf "%s.yaml" $role) (deepCopy $pool.env)) | nindent 6 }}
    resources:
      {{- toYaml $pool.resources | nindent 6 }}
    {{- include "slipstream.plainSecurity" $root | nindent 4 }}
    volumeMounts:
      - {name: settings, mountPath: /etc/slipstream, readOnly: true}
      - {name: tmp, mountPath: /tmp}
      - {name: cache, mountPath: /cache}
{{- end }}
containers:
  - name: slipstream
    {{- include "slipstream.image" (list $root "worker") | nindent 4 }}
    command: [slipstream]
    # The address is the pod's own: it is what others are told, and what is listened on.
    args: [{{ $role }}-worker, --host, $(POD_IP), --worker-id, $(POD_NAME), --node, $(NODE_NAME){{ include "slipstream.groupFlags" $pool }}]
    env:
      {{- include "slipstream.env" (list $root (printf "%s.yaml" $role) $env) | nindent 6 }}
    ports:
      - {name: metrics, containerPort: 7701}
      {{- if $leads }}
      - {name: grpc, containerPort: 7700}
      - {name: transfer, containerPort: 7702}
      {{- end }}
    # The gRPC server answers once the model is loaded. Whether the worker lives is asked of a service of its own: one
    # that drains lives, and is not ready.
    startupProbe:
      {{- $alive | nindent 6 }}
      periodSeconds: 30
      timeoutSeconds: 5
      failureThreshold: {{ add 1 (div (add $pool.startSeconds 29) 30) }}
    livenessProbe:
      {{- $alive | nindent 6 }}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 3
    readinessProbe:
      {{- $ready | nindent 6 }}
      periodSeconds: 5
      timeoutSeconds: 3
      failureThreshold: 3
    {{- include "slipstream.preStop" $pool | nindent 4 }}
    resources:
      {{- include "slipstream.workerResources" (list $root $pool) | nindent 6 }}
    securityContext:
      readOnlyRootFilesystem: true
      {{- if $fabric.privileged }}
      privileged: true
      {{- else }}
      allowPrivilegeEscalation: false
      capabilities:
        drop: [ALL]
        {{- if $fabric.lockMemory }}
        add: [IPC_LOCK]
        {{- end }}
      {{- end }}
    volumeMounts:
      - {name: settings, mountPath: /etc/slipstream, readOnly: true}
      {{- include "slipstream.securityMount" $root | nindent 6 }}
      - {name: tmp, mountPath: /tmp}
      - {name: shm, mountPath: /dev/shm}
      - {name: cache, mountPath: /cache}
volumes:
  - name: settings
    configMap:
      name: {{ include "slipstream.fullname" $root }}
      items: [{key: {{ $role }}.yaml, path: {{ $role }}.yaml}]
  {{- include "slipstream.securityVolume" (list $root "worker") | nindent 2 }}
  - {name: tmp, emptyDir: {}}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $pool.shmSize }}}
  {{- include "slipstream.modelCache" $root | nindent 2 }}
{{- end }}

{{/* A pool: a Deployment or a LeaderWorkerSet. Call with (list $ role). */}}
{{- define "slipstream.pool" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $pool := index $root.Values $role -}}
{{- $config := include "slipstream.workerConfig" . -}}
{{- if eq $pool.workload "LeaderWorkerSet" }}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {{ include "slipstream.fullname" $root }}-{{ $role }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "slipstream.labels" . | nindent 4 }}
    {{- include "slipstream.poolLabels" . | nindent 4 }}
  annotations:
    slipstream.dev/model: {{ include "slipstream.servedName" $root | quote }}
    slipstream.dev/max-replicas: {{ (index $root.Values.scaling $role).max | quote }}
    {{- if and (include "slipstream.isGroup" $pool) (eq $root.Values.placement.groups.policy "exclusive") }}
    leaderworkerset.sigs.k8s.io/exclusive-topology: {{ $root.Values.placement.groups.topologyKey }}
    {{- end }}
spec:
  {{- if not (include "slipstream.isScaled" $root) }}
  replicas: {{ $pool.replicas }}
  {{- end }}
  # All pods of a group at once: a leader is not ready before its followers have loaded their parts of the model.
  startupPolicy: LeaderCreated
  rolloutStrategy:
    type: RollingUpdate
    rollingUpdateConfiguration: {maxSurge: {{ $pool.maxSurge }}, maxUnavailable: {{ ternary 1 0 (eq (int $pool.maxSurge) 0) }}}
  leaderWorkerTemplate:
    size: {{ $pool.groupSize }}
    # A group computes together: when one of its pods is lost, all begin anew.
    restartPolicy: RecreateGroupOnPodRestart
    leaderTemplate:
      metadata:
        {{- include "slipstream.podMetadata" (list $root $role $pool $config (include "slipstream.memberLabel" (list $pool true))) | nindent 8 }}
      spec:
        {{- include "slipstream.workerPod" (list $root $role true) | nindent 8 }}
    workerTemplate:
      metadata:
        {{- include "slipstream.podMetadata" (list $root $role $pool $config (include "slipstream.memberLabel" (list $pool false))) | nindent 8 }}
      spec:
        {{- include "slipstream.workerPod" (list $root $role (eq (int $pool.groupSize) 1)) | nindent 8 }}
{{- else }}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "slipstream.fullname" $root }}-{{ $role }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "slipstream.labels" . | nindent 4 }}
    {{- include "slipstream.poolLabels" . | nindent 4 }}
  annotations:
    slipstream.dev/model: {{ include "slipstream.servedName" $root | quote }}
    slipstream.dev/max-replicas: {{ (index $root.Values.scaling $role).max | quote }}
spec:
  {{- if not (include "slipstream.isScaled" $root) }}
  replicas: {{ $pool.replicas }}
  {{- end }}
  strategy:
    rollingUpdate: {maxSurge: {{ $pool.maxSurge }}, maxUnavailable: {{ ternary 1 0 (eq (int $pool.maxSurge) 0) }}}
  progressDeadlineSeconds: {{ add $pool.startSeconds 600 }}
  selector:
    matchLabels:
      {{- include "slipstream.componentSelector" . | nindent 6 }}
  template:
    metadata:
      {{- include "slipstream.podMetadata" (list $root $role $pool $config) | nindent 6 }}
    spec:
      {{- include "slipstream.workerPod" (list $root $role true) | nindent 6 }}
{{- end }}
{{- end }}
