{{/* What the schema cannot see: values that do not go together. Each message begins with the key. */}}
{{- define "streamswav.check" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,43}[a-z0-9])?$" .name) -}}
{{- fail (printf "name: %q must be at most 45 of a-z, 0-9 and -, and begin with a letter: pods and a Service are named after it (default: the release's name)" .name) -}}
{{- end -}}
{{- if not .image.repository -}}
{{- fail "image.repository: say where the image is, as --set image.repository=REGISTRY/streamswav" -}}
{{- end -}}
{{- if or (contains "://" .image.repository) (regexMatch ":[^/]*$" .image.repository) -}}
{{- fail (printf "image.repository: %q is to be a name without https:// and without a tag, which is image.tag" .image.repository) -}}
{{- end -}}
{{- include "streamswav.checkRun" (dict "v" . "config" .config "key" "config") -}}
{{- $endpoint := dig "storage" "endpoint_url" "" .config -}}
{{- if and $endpoint (not (regexMatch "^https?://." $endpoint)) -}}
{{- fail (printf "config.storage.endpoint_url: %q must be http://HOST:PORT or https://HOST" $endpoint) -}}
{{- end -}}
{{- include "streamswav.checkVolumes" . -}}
{{- include "streamswav.checkIdentity" . -}}
{{- if and .monitoring.enabled (eq (dig "telemetry" "port" 9404 .config | int) 0) -}}
{{- fail "monitoring.enabled: config.telemetry.port is 0, so there is nothing to scrape; set one or the other" -}}
{{- end -}}
{{- if and (eq (int .gpusPerNode) 0) (eq (dig "training" "device" "auto" .config) "cuda") -}}
{{- fail "gpusPerNode: config.training.device is cuda, and there would be no GPU" -}}
{{- end -}}
{{- if and (eq .engine "trainjob") (ne (int .masterPort) 29500) -}}
{{- fail "masterPort: Kubeflow Trainer always uses 29500" -}}
{{- end -}}
{{- range .env -}}
{{- if regexMatch "^(PET_|MASTER_|NODE_RANK$|JOB_COMPLETION_INDEX$|STREAMSWAV_(RETRY_CODE|GRACE_SECONDS)$)" .name -}}
{{- fail (printf "env: %s is set by the chart or the operator; see nodes, gpusPerNode, masterPort and drainSeconds" .name) -}}
{{- end -}}
{{- end -}}
{{- if and (or .kueue.requiredTopology .kueue.preferredTopology .kueue.priorityClass) (not .kueue.queue) -}}
{{- fail "kueue.queue: say which LocalQueue; without one Kueue looks at nothing of this" -}}
{{- end -}}
{{- include "streamswav.checkFollowers" . -}}
{{- end -}}

{{- define "streamswav.checkRun" -}}
{{- if not (dig "stream" "urls" "" .config) -}}
{{- fail (printf "%s.stream.urls: say where the shards are, as --set '%s.stream.urls={s3://BUCKET/shards/}'" .key .key) -}}
{{- end -}}
{{- range .config.stream.urls -}}
{{- include "streamswav.checkPlace" (dict "v" $.v "key" (printf "%s.stream.urls" $.key) "place" .) -}}
{{- end -}}
{{- $directory := dig "run" "directory" "" .config -}}
{{- if not $directory -}}
{{- fail (printf "%s.run.directory: say where the run is kept, as --set %s.run.directory=s3://BUCKET/runs/first" .key .key) -}}
{{- end -}}
{{- include "streamswav.checkPlace" (dict "v" .v "key" (printf "%s.run.directory" .key) "place" $directory "written" true) -}}
{{- end -}}

{{/* A place that pods reach: `written` ones are in S3, or on the volume that is mounted at /runs. */}}
{{- define "streamswav.checkPlace" -}}
{{- $place := trimPrefix "@" .place -}}
{{- $mounted := and (hasPrefix "/runs/" $place) (or .v.runs.claim .v.runs.path) -}}
{{- $known := ternary "^s3://[^/]+" "^(s3://[^/]+|https?://[^/]+)" (default false .written) -}}
{{- if not (or $mounted (regexMatch $known $place)) -}}
{{- if contains "://" $place -}}
{{- fail (printf "%s: %q is no place that %s; use s3://BUCKET/..., or /runs/... with runs.claim" .key .place (ternary "a run can be written to" "can be read" (default false .written))) -}}
{{- else if .written -}}
{{- fail (printf "%s: %q is on a disk that goes with the pod; use s3://..., or /runs/... with runs.claim" .key .place) -}}
{{- else if hasPrefix "/" $place -}}
{{- fail (printf "%s: %q is nowhere in the pod; use s3://BUCKET/..., or /runs/... with runs.claim" .key .place) -}}
{{- else -}}
{{- fail (printf "%s: %q is nowhere in the pod; use s3://%s, or /runs/... with runs.claim" .key .place (regexReplaceAll "^(s3:?)?/*" $place "")) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Keys whose line is there and whose value is not: Helm takes them, and their defaults, away. */}}
{{- define "streamswav.checkGiven" -}}
{{- range list "image" "engine" "nodes" "gpusPerNode" "config" "identity" "resources" "resources.cpu" "resources.memory" "sharedMemory" "doctor" "doctor.enabled" "monitoring" "monitoring.enabled" -}}
{{- $found := $ -}}
{{- range splitList "." . -}}
{{- $found = get $found . -}}
{{- end -}}
{{- if or (kindIs "invalid" $found) (and (kindIs "string" $found) (eq $found "")) -}}
{{- fail (printf "%s: is empty; give it a value, or leave the line out" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "streamswav.checkVolumes" -}}
{{- $memory := include "streamswav.bytes" (dict "key" "resources.memory" "value" .resources.memory) | int64 -}}
{{- $shared := include "streamswav.bytes" (dict "key" "sharedMemory" "value" .sharedMemory) | int64 -}}
{{- if gt (mul 2 $shared) $memory -}}
{{- fail (printf "sharedMemory: %v of resources.memory: %v; what lies in /dev/shm counts against that limit, keep it to half" .sharedMemory .resources.memory) -}}
{{- end -}}
{{- if and .runs.claim .runs.path -}}
{{- fail "runs.path: give runs.claim or runs.path, not both" -}}
{{- end -}}
{{- if ne .cache.type "none" -}}
{{- $size := include "streamswav.bytes" (dict "key" "cache.size" "value" .cache.size) | int64 -}}
{{- if gt (int64 .config.storage.cache_bytes) $size -}}
{{- fail (printf "config.storage.cache_bytes: %v is more than cache.size: %v; the pod would be evicted when it is full" .config.storage.cache_bytes .cache.size) -}}
{{- end -}}
{{- if and (eq .cache.type "hostPath") (not .cache.path) -}}
{{- fail "cache.path: say which folder of the host (cache.type is hostPath)" -}}
{{- end -}}
{{- else if or .cache.size .cache.path -}}
{{- fail "cache.type: is none, although cache.size or cache.path is given; say emptyDir, ephemeral or hostPath" -}}
{{- else if dig "storage" "cache" "" .config -}}
{{- fail "config.storage.cache: the cache's volume and place are settled by cache.type and cache.size" -}}
{{- end -}}
{{- end -}}

{{- define "streamswav.checkIdentity" -}}
{{- if and .identity.roleArn .identity.secret -}}
{{- fail "identity.secret: keys in the environment win over identity.roleArn; give one of them" -}}
{{- end -}}
{{- if and .identity.roleArn (not .identity.create) -}}
{{- fail "identity.roleArn: is an annotation of the service account that the chart makes; with identity.create=false annotate your own" -}}
{{- end -}}
{{- if and .caBundle.configMap .caBundle.secret -}}
{{- fail "caBundle.secret: give caBundle.configMap or caBundle.secret, not both" -}}
{{- end -}}
{{- end -}}

{{- define "streamswav.checkFollowers" -}}
{{- if .finetune.enabled -}}
{{- include "streamswav.checkRun" (dict "v" . "config" .finetune.config "key" "finetune.config") -}}
{{- if not (or (dig "finetune" "test" "" .finetune.config) (dig "finetune" "test_split" "" .finetune.config)) -}}
{{- fail "finetune.config.finetune.test: say where the labelled shards are that accuracy is measured on, as [s3://BUCKET/labelled/test/]" -}}
{{- end -}}
{{- if eq (trimSuffix "/" .finetune.config.run.directory) (trimSuffix "/" .config.run.directory) -}}
{{- fail "finetune.config.run.directory: is the pretraining's; a run has a folder of its own" -}}
{{- end -}}
{{- $_ := include "streamswav.drainSeconds" (dict "v" (dict "drainSeconds" 0) "config" .finetune.config "key" "finetune.config") -}}
{{- end -}}
{{- if and .evaluation.enabled (not (and .evaluation.train .evaluation.test)) -}}
{{- fail "evaluation.train, evaluation.test: say where the labelled shards are" -}}
{{- end -}}
{{- if .evaluation.enabled -}}
{{- range $key := list "train" "test" -}}
{{- range get $.evaluation $key -}}
{{- include "streamswav.checkPlace" (dict "v" $ "key" (printf "evaluation.%s" $key) "place" .) -}}
{{- end -}}
{{- end -}}
{{- with .evaluation.json -}}
{{- include "streamswav.checkPlace" (dict "v" $ "key" "evaluation.json" "place" . "written" true) -}}
{{- end -}}
{{- end -}}
{{- end -}}
