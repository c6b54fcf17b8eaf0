# The trainer in a container; the base can be replaced (CUDA comes with torch's wheels).
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

WORKDIR /opt/streamswav
COPY pyproject.toml README.md LICENSE ./
COPY ops/constraints.txt ops/constraints.txt
COPY streamswav streamswav
COPY shards shards
RUN pip install --no-cache-dir -c ops/constraints.txt .

# What run_info and /status call the code: --build-arg GIT_SHA=$(git rev-parse --short=12 HEAD)
ARG GIT_SHA=unknown
ENV STREAMSWAV_GIT_SHA=${GIT_SHA}

RUN useradd --uid 1000 --create-home streamswav
USER 1000
ENTRYPOINT ["streamswav"]
