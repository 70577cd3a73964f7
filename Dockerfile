# Build args: VARIANT=gpu|cpu, BASE_IMAGE (any image with Python 3.11 or newer and its venv module),
# REVISION (the commit that is built, for the image's labels).
ARG BASE_IMAGE=python:3.12-slim
ARG VARIANT=gpu

# The environment with the locked dependencies; pip itself stays outside of it.
FROM ${BASE_IMAGE} AS dependencies
ARG VARIANT
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/retinaserve
COPY requirements-${VARIANT}.lock /build/requirements.lock
RUN /opt/pip/bin/pip --python /opt/retinaserve/bin/python install --no-cache-dir \
      --require-hashes --requirement /build/requirements.lock

# The project goes into a tree of its own, so that a change of code renews a small layer
# and not the gigabytes of CUDA libraries.
FROM dependencies AS project
COPY pyproject.toml README.md LICENSE /build/
COPY service /build/service
COPY model_export /build/model_export
RUN /opt/pip/bin/pip --python /opt/retinaserve/bin/python install --no-cache-dir \
      --no-deps --prefix /opt/project /build

FROM ${BASE_IMAGE} AS runtime
COPY --from=dependencies /opt/retinaserve /opt/retinaserve
COPY --from=project /opt/project /opt/retinaserve
ENV PATH=/opt/retinaserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RETINASERVE_HOST=0.0.0.0
# Numeric, so that an orchestrator can see that it is not root; any other uid works as well.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", \
  "import http.client, os, sys; p = os.environ.get('RETINASERVE_PORT', '').strip(); c = http.client.HTTPConnection('127.0.0.1', int(p) if p.isdecimal() else 8000, timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["retinaserve"]
CMD ["serve"]

FROM runtime AS runtime-cpu
ENV RETINASERVE_DEVICE=cpu

FROM runtime AS runtime-gpu
# A GPU image that finds no usable GPU must fail to start, not serve slowly from the CPU.
ENV RETINASERVE_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime-${VARIANT}
ARG BASE_IMAGE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="retinaserve" \
      org.opencontainers.image.description="RetinaNet object detection over HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
