{{/* A headless Service: it gives the pods of a Job their names, JOB-INDEX.SERVICE. */}}
{{- define "streamswav.service" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ .name }}
  labels:
    {{- toYaml .labels | nindent 4 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true # the ranks meet before any of them is ready
  selector:
    streamswav-run: {{ .run }}
  ports:
    - {name: rendezvous, port: {{ int .port }}}
{{- end -}}
