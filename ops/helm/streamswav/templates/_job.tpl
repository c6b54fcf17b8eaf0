{{/*
Spec of an Indexed Job whose pods are a gang. As `streamswav.pod`, and:
  inSet    a JobSet restarts the gang as a whole, so the first failure fails the Job
  suspend  "true" where it waits to be let go, as `streamswav.suspended` says
Exit codes: 0 done, 75 saved (or storage or a peer was gone), 78 something has to be changed, 1 anything else.
*/}}
{{- define "streamswav.jobSpec" -}}
completions: {{ .nodes }}
parallelism: {{ .nodes }}
completionMode: Indexed
{{- if eq (default "" .suspend) "true" }}
suspend: true
{{- end }}
# A new pod may only come when the old one is gone: until then it holds its host, its GPUs and the run's lease.
podReplacementPolicy: Failed
# Node 0 ends with 0 only when the run is done. A pod that is lost after that is not worth a new gang, which
# would wait for a node 0 that never comes again.
successPolicy:
  rules:
    - succeededIndexes: "0"
{{- if .inSet }}
backoffLimit: 0
podFailurePolicy:
  rules: # FailJob in each: its message tells the JobSet which it was
    - action: FailJob
      onExitCodes: {operator: In, values: [78]}
    - action: FailJob
      onExitCodes: {operator: In, values: [75]}
    - action: FailJob
      onPodConditions:
        - {type: DisruptionTarget, status: "True"}
{{- else }}
# Crashes (exit code 1) are counted, over all pods; every pod of the gang comes back by itself.
backoffLimit: {{ .v.maxRestarts | int }}
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes: {operator: In, values: [78]}
    - action: Ignore # free of charge: drained, or its peers were
      onExitCodes: {operator: In, values: [75]}
    - action: Ignore
      onPodConditions:
        - {type: DisruptionTarget, status: "True"}
{{- end }}
template:
  {{- include "streamswav.pod" . | nindent 2 }}
{{- end -}}

{{/* What a JobSet does when its Job fails; the patterns are of the Job controller's messages. */}}
{{- define "streamswav.failurePolicy" -}}
maxRestarts: {{ .maxRestarts | int }}
# The old gang is gone before the new one comes: it holds the GPUs, and the run's lease.
restartStrategy: BlockingRecreate
rules:
  - name: somethingHasToBeChanged
    action: FailJobSet
    onJobFailureReasons: [PodFailurePolicy]
    onJobFailureMessagePatterns: ["failed with exit code 78 matching"]
  - name: drainedOrDisrupted
    action: RestartJobSetAndIgnoreMaxRestarts
    onJobFailureReasons: [PodFailurePolicy]
    onJobFailureMessagePatterns:
      - "failed with exit code 75 matching"
      - "has condition DisruptionTarget matching"
{{- /* Anything else counts towards maxRestarts: a crash, and peers of a drained pod that race it with 1. */ -}}
{{- end -}}

{{- define "streamswav.kueueLabels" -}}
{{- with .kueue.queue -}}
kueue.x-k8s.io/queue-name: {{ . }}
{{- end }}
{{- with .kueue.priorityClass }}
kueue.x-k8s.io/priority-class: {{ . }}
{{- end }}
{{- end -}}

{{/* What `streamswav.pod` and `streamswav.jobSpec` take, for the release's main gang. */}}
{{- define "streamswav.gang" -}}
{{- $v := .v -}}
{{- $ranks := int $v.ranks -}}
{{- $arguments := concat (list $v.command "--config" "/etc/streamswav/config.yaml") $v.arguments -}}
run: {{ $v.name }}
container: {{ .container }}
nodes: {{ int $v.nodes }}
ranks: {{ $ranks }}
drain: {{ int $v.drainSeconds }}
config: config.yaml
arguments: {{ toJson $arguments }}
inSet: {{ .inSet }}
{{- if .address }}
env:
  {{- include "streamswav.rendezvous" (dict "nodes" $v.nodes "ranks" $ranks "address" .address "port" $v.masterPort) | nindent 2 }}
{{- end }}
{{- end -}}

{{/* PET_*, as torchrun and streamswav launch read them: all meet at pod 0, whose name is known beforehand. */}}
{{- define "streamswav.rendezvous" -}}
- {name: PET_NNODES, value: {{ int .nodes | quote }}}
- {name: PET_NPROC_PER_NODE, value: {{ int .ranks | quote }}}
- name: PET_NODE_RANK
  valueFrom:
    fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
- {name: PET_MASTER_ADDR, value: {{ .address }}}
- {name: PET_MASTER_PORT, value: {{ int .port | quote }}}
{{- end -}}
