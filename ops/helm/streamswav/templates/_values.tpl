{{/*
The values with defaults and what follows from them, as YAML: every template begins with
`{{- $v := include "streamswav.values" . | fromYaml }}`. What cannot work is refused here, by key.
*/}}
{{- define "streamswav.values" -}}
{{- include "streamswav.checkGiven" .Values -}}
{{- $v := mergeOverwrite (.Files.Get "defaults.yaml" | fromYaml) (omit (deepCopy .Values) "global") -}}
{{- $_ := set $v "name" (default .Release.Name $v.name) -}}
{{- $_ := set $v "labels" (dict "app.kubernetes.io/name" "streamswav" "app.kubernetes.io/instance" .Release.Name) -}}
{{- $_ := set $v "retryCode" (ternary 143 75 (eq $v.engine "pytorchjob")) -}}
{{- $_ := set $v "ranks" (ternary (int $v.ranksPerNode) (max 1 (int $v.gpusPerNode)) (gt (int $v.ranksPerNode) 0)) -}}
{{- $_ := set $v "config" (include "streamswav.config" (dict "v" $v "config" $v.config) | fromYaml) -}}
{{- $_ := set $v "drainSeconds" (include "streamswav.drainSeconds" (dict "v" $v "config" $v.config "key" "config") | int) -}}
{{- if $v.finetune.enabled -}}
{{- $shared := pick $v.config "storage" "telemetry" "watchdog" -}}
{{- $config := merge (dict) (include "streamswav.listed" $v.finetune.config | fromYaml) $shared -}}
{{- if not (dig "model" "init" "" $config) -}}
{{- $_ := set $config "model" (merge (dict "init" (default $v.config.run.directory $v.finetune.init)) (default (dict) $config.model)) -}}
{{- end -}}
{{- $_ := set $v.finetune "config" $config -}}
{{- end -}}
{{- include "streamswav.check" $v -}}
{{- toYaml $v -}}
{{- end -}}

{{/* A configuration whose shards are a list: of one, where a text is given. */}}
{{- define "streamswav.listed" -}}
{{- $config := deepCopy . -}}
{{- $urls := dig "stream" "urls" (list) $config -}}
{{- if kindIs "string" $urls -}}
{{- $_ := set $config.stream "urls" (ternary (list $urls) (list) (ne $urls "")) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/*
Whether an object waits to be let go, of apiVersion, kind and name: as it is now in the cluster, so that an
upgrade does not suspend what Kueue or the follower has let go; and true where it is not there yet.
*/}}
{{- define "streamswav.suspended" -}}
{{- $live := lookup .apiVersion .kind .root.Release.Namespace .name -}}
{{- if $live -}}
{{- $spec := ternary (dig "spec" "runPolicy" (dict) $live) $live.spec (eq .kind "PyTorchJob") -}}
{{- dig "suspend" false $spec -}}
{{- else -}}
true
{{- end -}}
{{- end -}}

{{/* Storage as variables too, for `kubectl exec` of commands that read no configuration file. */}}
{{- define "streamswav.storageEnv" -}}
{{- range $key, $value := default (dict) .storage }}
{{- if not (or (hasPrefix "cache" $key) (kindIs "invalid" $value)) }}
- {name: STREAMSWAV_STORAGE__{{ upper $key }}, value: {{ toString $value | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* A configuration with what the pod's volumes settle: where the cache is, how large, and the CA bundle. */}}
{{- define "streamswav.config" -}}
{{- $config := include "streamswav.listed" .config | fromYaml -}}
{{- $storage := default (dict) $config.storage -}}
{{- if ne .v.cache.type "none" -}}
{{- $_ := set $storage "cache" "/cache" -}}
{{- if not (hasKey $storage "cache_bytes") -}}
{{- /* Nine tenths: above its size limit the kubelet evicts the pod. */ -}}
{{- $size := include "streamswav.bytes" (dict "key" "cache.size" "value" .v.cache.size) | int64 -}}
{{- $_ := set $storage "cache_bytes" (div (mul $size 9) 10) -}}
{{- end -}}
{{- end -}}
{{- if or .v.caBundle.configMap .v.caBundle.secret -}}
{{- $_ := set $storage "ca_bundle" (printf "/etc/streamswav-ca/%s" .v.caBundle.key) -}}
{{- end -}}
{{- if $storage -}}
{{- $_ := set $config "storage" $storage -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/*
Seconds that a pod has to end its step and save after SIGTERM: what the watchdog allows a step and a
checkpoint, so that nobody is killed in the midst of what still counts as healthy.
*/}}
{{- define "streamswav.drainSeconds" -}}
{{- $watchdog := default (dict) .config.watchdog -}}
{{- $step := dig "step_seconds" 900 $watchdog | float64 -}}
{{- $checkpoint := dig "checkpoint_seconds" 1800 $watchdog | float64 -}}
{{- $needed := ceil (addf $step $checkpoint) | int -}}
{{- $given := int .v.drainSeconds -}}
{{- if and (not $given) (or (eq $step 0.0) (eq $checkpoint 0.0)) -}}
{{- fail (printf "drainSeconds: %s.watchdog sets no limit to a step or a checkpoint, so say how long a drained pod may take" .key) -}}
{{- end -}}
{{- if and $given (lt $given $needed) -}}
{{- fail (printf "drainSeconds: %d is less than the %d s that %s.watchdog allows a step and a checkpoint (step_seconds %v + checkpoint_seconds %v): pods would be killed while they save; lower those, or leave drainSeconds out" $given $needed .key $step $checkpoint) -}}
{{- end -}}
{{- max $given $needed -}}
{{- end -}}

{{/* Bytes of a quantity such as 16Gi. */}}
{{- define "streamswav.bytes" -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $quantity := toString .value -}}
{{- if not $quantity -}}
{{- fail (printf "%s: say how much, as 500Gi" .key) -}}
{{- end -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?" $quantity -}}
{{- $unit := trimPrefix $number $quantity -}}
{{- if or (not $number) (not (hasKey $units $unit)) -}}
{{- fail (printf "%s: %q is not an amount of memory such as 16Gi" .key $quantity) -}}
{{- end -}}
{{- mulf (float64 $number) (get $units $unit) | int64 -}}
{{- end -}}
