# Frontend and planner: no torch, no engine. Two images out of one file (see docs/deploy/images.md):
#   docker build -f deploy/images/light.Dockerfile --target frontend -t slipstream-frontend .
#   docker build -f deploy/images/light.Dockerfile --target planner -t slipstream-planner .
ARG PYTHON_TAG=3.11.14-slim-bookworm
# `@sha256:...` of that tag pins the base to the byte.
ARG PYTHON_DIGEST=""

FROM docker.io/library/python:${PYTHON_TAG}${PYTHON_DIGEST} AS build
ENV UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
WORKDIR /src
COPY requirements/installer.lock requirements/image-build.lock requirements/image-light.lock requirements/
RUN python -m venv /opt/installer \
    && /opt/installer/bin/python -m pip install --no-cache-dir --require-hashes \
        -r requirements/installer.lock -r requirements/image-build.lock
RUN --mount=type=cache,target=/var/cache/uv \
    python -m venv --without-pip /opt/slipstream \
    && /opt/installer/bin/uv pip sync --python /opt/slipstream/bin/python --require-hashes --compile-bytecode \
        requirements/image-light.lock
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

FROM docker.io/library/python:${PYTHON_TAG}${PYTHON_DIGEST} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Slipstream" \
    org.opencontainers.image.description="Frontend and planner of a disaggregated prefill/decode serving cluster" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 slipstream \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/slipstream \
        --shell /usr/sbin/nologin slipstream \
    && install --directory --owner 10001 --group 10001 /var/cache/slipstream
COPY --from=build /opt/slipstream /opt/slipstream
COPY deploy/images/healthcheck.py /opt/slipstream/healthcheck.py
ENV PATH=/opt/slipstream/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/slipstream \
    XDG_CACHE_HOME=/var/cache/slipstream \
    HF_HOME=/var/cache/slipstream/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    SLIPSTREAM_LOG__FORMAT=json
WORKDIR /var/cache/slipstream
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["slipstream"]

FROM runtime AS planner
ENV SLIPSTREAM_CONTROL_PLANE__HOST=0.0.0.0 \
    SLIPSTREAM_CONTROL_PLANE__METRICS_PORT=7601
EXPOSE 7600 7601
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-I", "/opt/slipstream/healthcheck.py", "grpc", "127.0.0.1:7600"]
CMD ["planner", "serve"]

FROM runtime AS frontend
ENV SLIPSTREAM_FRONTEND__HOST=0.0.0.0
EXPOSE 8000 8001
# Alive, not ready: a frontend without workers is no reason to start it again.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s --retries=3 \
    CMD ["python", "-I", "/opt/slipstream/healthcheck.py", "http", "http://127.0.0.1:8000/health/live"]
CMD ["frontend"]
