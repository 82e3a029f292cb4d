# A worker that computes on CPUs, or simulates: everything of requirements/full.lock but the developers' tools.
#   docker build -f deploy/images/worker-cpu.Dockerfile -t slipstream-worker-cpu .
ARG PYTHON_TAG=3.11.14-slim-bookworm
# `@sha256:...` of that tag pins the base to the byte.
ARG PYTHON_DIGEST=""

FROM docker.io/library/python:${PYTHON_TAG}${PYTHON_DIGEST} AS build
# The page lists torch alone, whose CPU build is on no other index. The lock has no hash for it: give one here.
ARG TORCH_WHEELS=https://download.pytorch.org/whl/cpu/torch/
ARG TORCH_SHA256=""
ENV UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
WORKDIR /src
COPY requirements/installer.lock requirements/image-build.lock requirements/image-worker.lock requirements/
RUN python -m venv /opt/installer \
    && /opt/installer/bin/python -m pip install --no-cache-dir --require-hashes \
        -r requirements/installer.lock -r requirements/image-build.lock
RUN sed '/^torch==/d' requirements/image-worker.lock >/opt/hashed.lock \
    && sed -n "s/^\(torch==[^ ]*\).*/\1${TORCH_SHA256:+ --hash=sha256:${TORCH_SHA256}}/p" requirements/image-worker.lock \
        >/opt/torch.lock
RUN --mount=type=cache,target=/var/cache/uv \
    python -m venv --without-pip /opt/slipstream \
    && /opt/installer/bin/uv pip install --python /opt/slipstream/bin/python --no-deps --require-hashes \
        --compile-bytecode -r /opt/hashed.lock \
    && /opt/installer/bin/uv pip install --python /opt/slipstream/bin/python --no-deps --no-index \
        --find-links "${TORCH_WHEELS}" --verify-hashes --compile-bytecode -r /opt/torch.lock
COPY pyproject.toml README.md LICENSE ./
COPY slipstream slipstream
COPY kv_transfer kv_transfer
COPY engine engine
COPY prefill_worker prefill_worker
COPY decode_worker decode_worker
COPY frontend frontend
COPY planner planner
COPY deploy deploy
COPY simulator simulator
COPY benchmarks benchmarks
RUN /opt/installer/bin/python -m pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /dist . \
    && /opt/installer/bin/uv pip install --python /opt/slipstream/bin/python --no-deps --no-index --compile-bytecode \
        /dist/*.whl

FROM docker.io/library/python:${PYTHON_TAG}${PYTHON_DIGEST} AS worker
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Slipstream worker (CPU)" \
    org.opencontainers.image.description="Prefill or decode worker with vLLM's CPU engine, or the simulated one" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# For vLLM's CPU kernels.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1=2.0.16-1 \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 slipstream \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/slipstream \
        --shell /usr/sbin/nologin slipstream \
    && install --directory --owner 10001 --group 10001 /var/cache/slipstream
COPY --from=build /opt/slipstream /opt/slipstream
COPY deploy/images/healthcheck.py /opt/slipstream/healthcheck.py
# Others must reach a worker under `worker.host`: set SLIPSTREAM_WORKER__HOST to the container's address.
ENV PATH=/opt/slipstream/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/slipstream \
    XDG_CACHE_HOME=/var/cache/slipstream \
    HF_HOME=/var/cache/slipstream/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    SLIPSTREAM_LOG__FORMAT=json \
    SLIPSTREAM_DEVICE=cpu \
    SLIPSTREAM_WORKER__PORT=7700 \
    SLIPSTREAM_WORKER__METRICS_PORT=7701 \
    SLIPSTREAM_TRANSFER__PORT=7702
WORKDIR /var/cache/slipstream
USER 10001:10001
STOPSIGNAL SIGTERM
EXPOSE 7700 7701 7702
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-I", "/opt/slipstream/healthcheck.py", "worker"]
ENTRYPOINT ["slipstream"]
CMD ["decode-worker"]
