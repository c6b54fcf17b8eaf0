{{/*
A pod of a gang: metadata and spec.
  v          values, from streamswav.values
  root       the root context
  run        value of the label streamswav-run, by which metrics, budgets and policies know the run
  container  name of the container; Kubeflow's operators want one of their own
  arguments  of `streamswav launch`
  config     the configuration's file name in the ConfigMap; none: the command has no --config
  env        beside what every pod has
  nodes      of the gang
  drain      seconds to save in
  retryCode  exit code in place of 75; default: what the engine wants
*/}}
{{- define "streamswav.pod" -}}
{{- $v := .v -}}
metadata:
  labels:
    {{- include "streamswav.podLabels" . | nindent 4 }}
  annotations:
    # An interruption costs the whole gang a restart: consolidation and scale-down are to leave it alone.
    karpenter.sh/do-not-disrupt: "true"
    cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
    {{- with $v.kueue.requiredTopology }}
    kueue.x-k8s.io/podset-required-topology: {{ . | quote }}
    {{- end }}
    {{- with $v.kueue.preferredTopology }}
    kueue.x-k8s.io/podset-preferred-topology: {{ . | quote }}
    {{- end }}
    {{- if not $v.monitoring.enabled }}
    # Without the operator: what a Prometheus of the common chart looks for.
    prometheus.io/scrape: "true"
    prometheus.io/port: {{ include "streamswav.metricsPort" . | quote }}
    {{- end }}
    {{- with $v.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- if ne .container "pytorch" }}
  restartPolicy: Never # a rank alone cannot come back: the gang restarts, and the Job decides by the exit code
  {{- end }}
  # Above the launcher's own limit, which ends what does not save with its stacks: SIGKILL tells nobody why.
  terminationGracePeriodSeconds: {{ add .drain 90 }}
  serviceAccountName: {{ include "streamswav.serviceAccount" $v }}
  automountServiceAccountToken: false # nothing here talks to Kubernetes; IRSA and Pod Identity bring their own
  enableServiceLinks: false
  dnsConfig:
    # A store's name has two dots or more: without this each look-up asks for it in four search domains first.
    options:
      - {name: ndots, value: "2"}
  {{- with .subdomain }}
  subdomain: {{ . }}
  {{- end }}
  {{- with $v.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $v.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $v.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "streamswav.placement" . }}
  {{- . | nindent 2 }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ $v.runAsUser | int }}
    runAsGroup: {{ $v.runAsUser | int }}
    fsGroup: {{ $v.runAsUser | int }}
    fsGroupChangePolicy: OnRootMismatch # a full cache has millions of files: not at every start
    seccompProfile:
      type: RuntimeDefault
  {{- if and $v.doctor.enabled .config }}
  initContainers:
    # With the container's own GPUs, volumes and identity: what it finds is what the ranks will meet.
    - name: doctor
      {{- include "streamswav.image" . | nindent 6 }}
      command: {{ concat (list "streamswav" "doctor" "--for") .arguments | toJson }}
      {{- include "streamswav.containerCommon" . | nindent 6 }}
  {{- end }}
  containers:
    - name: {{ .container }}
      {{- include "streamswav.image" . | nindent 6 }}
      # In exec form: the launcher is PID 1 and hears SIGTERM itself.
      command: [streamswav, launch]
      args: {{ .arguments | toJson }}
      {{- include "streamswav.containerCommon" . | nindent 6 }}
      {{- include "streamswav.ports" . | nindent 6 }}
  volumes:
    {{- include "streamswav.volumes" $v | nindent 4 }}
{{- end -}}

{{- define "streamswav.podLabels" -}}
{{ toYaml .v.labels }}
streamswav-run: {{ .run }}
{{- with .v.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "streamswav.image" -}}
{{- $image := .v.image -}}
{{- $version := ternary (printf "@%s" $image.digest) (printf ":%s" (default .root.Chart.AppVersion $image.tag)) (ne $image.digest "") -}}
image: {{ printf "%s%s" $image.repository $version | quote }}
imagePullPolicy: {{ $image.pullPolicy }}
{{- end -}}

{{/* Environment, resources, rights and mounts: the same for the ranks and for doctor, who speaks for them. */}}
{{- define "streamswav.containerCommon" -}}
{{- $v := .v -}}
env:
  - {name: HOME, value: /tmp}
  - {name: STREAMSWAV_GRACE_SECONDS, value: {{ .drain | quote }}}
  {{- $retryCode := default $v.retryCode .retryCode | int }}
  {{- if ne $retryCode 75 }}
  - {name: STREAMSWAV_RETRY_CODE, value: {{ $retryCode | quote }}}
  {{- end }}
  {{- include "streamswav.storageEnv" $v.config | nindent 2 }}
  {{- with .env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with $v.identity.secret }}
  {{- range $name, $optional := dict "AWS_ACCESS_KEY_ID" false "AWS_SECRET_ACCESS_KEY" false "AWS_SESSION_TOKEN" true }}
  - name: {{ $name }}
    valueFrom:
      secretKeyRef: {name: {{ $v.identity.secret }}, key: {{ $name }}, optional: {{ $optional }}}
  {{- end }}
  {{- end }}
  {{- with concat $v.fabric.env $v.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
resources:
  {{- $devices := dict -}}
  {{- if int $v.gpusPerNode -}}
  {{- $_ := set $devices $v.gpuResource ($v.gpusPerNode | int) -}}
  {{- end -}}
  {{- $devices = merge $devices $v.fabric.resources }}
  requests:
    cpu: {{ $v.resources.cpu | quote }}
    memory: {{ $v.resources.memory }}
    {{- with $devices }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  limits:
    memory: {{ $v.resources.memory }}
    {{- with $devices }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    {{- if $v.fabric.ipcLock }}
    add: [IPC_LOCK] # to register memory with the network card; outside of the restricted profile
    {{- end }}
volumeMounts:
  - {name: config, mountPath: /etc/streamswav, readOnly: true}
  - {name: scratch, mountPath: /tmp}
  - {name: shm, mountPath: /dev/shm}
  {{- if ne $v.cache.type "none" }}
  - {name: cache, mountPath: /cache}
  {{- end }}
  {{- if or $v.runs.claim $v.runs.path }}
  - {name: runs, mountPath: /runs}
  {{- end }}
  {{- if or $v.caBundle.configMap $v.caBundle.secret }}
  - {name: ca, mountPath: /etc/streamswav-ca, readOnly: true}
  {{- end }}
{{- end -}}

{{- define "streamswav.metricsPort" -}}
{{- dig "telemetry" "port" 9404 .v.config | int -}}
{{- end -}}

{{- define "streamswav.ports" -}}
{{- $port := include "streamswav.metricsPort" . | int -}}
ports:
  - {name: {{ ternary "pytorchjob-port" "rendezvous" (eq .container "pytorch") }}, containerPort: {{ .v.masterPort | int }}}
  {{- if and $port .config }}
  - {name: metrics, containerPort: {{ $port }}}
{{- /* Progress is no probe's business: the launcher's watchdog ends what hangs, phase by phase, with stacks. */}}
startupProbe: # ten minutes: on a fresh host torch is read from a cold disk before anything can answer
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 10
  failureThreshold: 60
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 10
livenessProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 20 # two minutes in all: on a loaded host the launcher may answer late
  timeoutSeconds: 10
  failureThreshold: 6
  {{- end }}
{{- end -}}

{{- define "streamswav.placement" -}}
{{- $selector := dict "matchLabels" (dict "streamswav-run" .run) -}}
{{- if and .v.onePodPerHost (gt (int .nodes) 1) -}}
topologySpreadConstraints:
  # With as many domains as pods, one more on the same host is a skew of 2, however few hosts there are.
  - topologyKey: kubernetes.io/hostname
    maxSkew: 1
    minDomains: {{ .nodes }}
    whenUnsatisfiable: DoNotSchedule
    nodeTaintsPolicy: Honor
    labelSelector: {{ toJson $selector }}
{{- end }}
{{- if and .v.topologyKey (gt (int .nodes) 1) }}
affinity:
  podAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: {{ .v.topologyKey }}
        labelSelector: {{ toJson $selector }}
{{- end }}
{{- end -}}

{{- define "streamswav.volumes" -}}
- name: config
  configMap: {name: {{ .name }}}
- name: scratch
  emptyDir: {sizeLimit: {{ .scratch }}}
- name: shm
  # Without it a pod has 64 MB there, and the first large batch ends in a bus error.
  emptyDir: {medium: Memory, sizeLimit: {{ .sharedMemory }}}
{{- if eq .cache.type "emptyDir" }}
- name: cache
  emptyDir: {sizeLimit: {{ .cache.size }}}
{{- else if eq .cache.type "hostPath" }}
- name: cache
  hostPath: {path: {{ .cache.path }}, type: Directory}
{{- else if eq .cache.type "ephemeral" }}
- name: cache
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .cache.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources: {requests: {storage: {{ .cache.size }}}}
{{- end }}
{{- if .runs.claim }}
- name: runs
  persistentVolumeClaim: {claimName: {{ .runs.claim }}}
{{- else if .runs.path }}
- name: runs
  hostPath: {path: {{ .runs.path }}, type: Directory}
{{- end }}
{{- if .caBundle.configMap }}
- name: ca
  configMap: {name: {{ .caBundle.configMap }}}
{{- else if .caBundle.secret }}
- name: ca
  secret: {secretName: {{ .caBundle.secret }}}
{{- end }}
{{- end -}}

{{- define "streamswav.serviceAccount" -}}
{{- if .identity.name -}}{{ .identity.name }}{{- else if .identity.create -}}{{ .name }}{{- else -}}default{{- end -}}
{{- end -}}
