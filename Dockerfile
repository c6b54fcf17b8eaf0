# The trainer in a container: `bash ops/build-image` builds it, ops/image.md says what is in it and why.
# As base does any Debian with Python 3.11 or newer, its own included (python3, python3-venv, ca-certificates). CUDA
# comes with torch's wheels, the driver from the node. Name the base by its digest where a build must be repeatable.
ARG BASE=python:3.11-slim-bookworm

# What the lock files name, in /opt/venv.
FROM ${BASE} AS dependencies
ARG LOCKS=ops/locks
ARG EXTRAS="embed evaluate export"
ARG TORCH_INDEX=""
ARG PIP_NO_INDEX=""
WORKDIR /build
COPY ${LOCKS} locks
COPY ops/image/install ops/image/slim ./
# A mirror's pip.conf may hold a password: it is there while pip runs, and in no layer.
RUN --mount=type=bind,source=ops/wheels,target=/build/wheels --mount=type=secret,id=pip,target=/etc/pip.conf \
    bash install /opt/venv && bash slim /opt/venv

# The project, and the whole as parts: a node that has a layer does not pull it again.
FROM dependencies AS parts
COPY pyproject.toml README.md LICENSE ./
COPY streamswav streamswav
COPY shards shards
COPY ops/licences.md ops/image/split ./
RUN bash split /opt/venv /parts

FROM ${BASE}
ARG PACKAGES=""
# PACKAGES are Debian's, for what a site needs: libibverbs1 for RDMA, a compiler for training.compile.
# hadolint ignore=DL3008,SC2086
RUN groupadd --gid 65532 streamswav \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin streamswav \
    && install --directory --owner 65532 --group 65532 /runs /cache \
    && python3 -m compileall -q -x '/(test|lib2to3|idlelib)/' "$(python3 -c 'import os; print(os.path.dirname(os.__file__))')" \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && if [ -n "${PACKAGES}" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends ${PACKAGES} && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=parts /parts/nvidia /
COPY --from=parts /parts/torch /
COPY --from=parts /parts/libraries /
COPY --from=parts /parts/project /

# The root may be read-only: whatever is written goes to /tmp, to the run and to the node's cache. TORCH_LOGS leaves
# out one line of torch's, at every start, on Triton that is not there.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/.cache \
    TORCH_HOME=/tmp/.cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/tmp/.cache/inductor \
    TRITON_CACHE_DIR=/tmp/.cache/triton \
    TORCH_LOGS=-torch.utils.flop_counter
WORKDIR /runs
USER 65532:65532
EXPOSE 9404
STOPSIGNAL SIGTERM
ENTRYPOINT ["streamswav", "launch"]

ARG VERSION=""
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
ENV STREAMSWAV_GIT_SHA=${REVISION}
LABEL org.opencontainers.image.title="streamswav" \
    org.opencontainers.image.description="SwAV pretraining of image trunks, in one pass over tar shards in S3" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.source="${SOURCE}"
