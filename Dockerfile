# Classic syntax: no BuildKit is needed. `python -m deploy image build` gives the arguments; docs/deploy.md explains them.
# BASE_IMAGE has Python 3.11 and nothing more of ours; BUILD_IMAGE the same Python with pip and g++.
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG BUILD_IMAGE=python:3.11-bookworm
# The same Python: CUDA 13's libraries come with requirements/gpu.txt, the driver from the host's container toolkit.
ARG GPU_BASE_IMAGE=python:3.11-slim-bookworm

# -- what every target needs of the source, and the server's libraries ------------------------------------------------

FROM ${BASE_IMAGE} AS base

FROM ${BUILD_IMAGE} AS build
COPY deploy/image_tools /tools
COPY requirements/serve.txt /requirements/
RUN python3 -m pip install --no-cache-dir --no-compile --no-deps --target /opt/site -r /requirements/serve.txt \
    && sh /tools/trim.sh /opt/site
COPY proto /app/proto
COPY serve /app/serve
# The operators are for x86; anywhere else the server runs the stock graph.
RUN PYTHONPATH=/app:/opt/site python3 -m serve.native || [ "$(uname -m)" != x86_64 ]
RUN sh /tools/compile.sh /app /opt/site
COPY --from=base /var/lib/dpkg/status /opt/debian.txt
RUN python3 /tools/sbom.py /opt/site /opt/debian.txt > /app/sbom.cdx.json
# A fresh volume takes owner and rights of the folder that it covers.
RUN mkdir /data && chown 65532:65532 /data && chmod 700 /data

# -- serve: the server on CPUs, without torch --------------------------------------------------------------------------

FROM ${BASE_IMAGE} AS serve
ARG REVISION=unknown
ARG MODEL_DIGEST=none
LABEL org.opencontainers.image.title="pawl-serve" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      pawl.model.digest="${MODEL_DIGEST}"
COPY --from=build /opt/site /opt/site
COPY --from=build /app /app
COPY --from=build --chown=65532:65532 /data /data
# HTTP_PORT is for the health check alone: give it with another --http-port.
ENV PYTHONPATH=/app:/opt/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HTTP_PORT=8000
WORKDIR /app
USER 65532:65532
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "/app/serve/health.py"]
ENTRYPOINT ["python3", "-m", "serve"]
CMD ["--model", "/model", "--host", "0.0.0.0", "--records", "/data/records.sqlite", "--derived", "/data"]

# -- serve-gpu: the same with ONNX Runtime's CUDA build and CUDA's libraries ------------------------------------------

FROM build AS build-gpu
COPY requirements/gpu.txt /requirements/
RUN rm -rf /opt/site/onnxruntime /opt/site/onnxruntime-*.dist-info \
    && python3 -m pip install --no-cache-dir --no-compile --no-deps --target /opt/site -r /requirements/gpu.txt \
    && sh /tools/trim.sh /opt/site && sh /tools/compile.sh /app /opt/site
COPY --from=base /var/lib/dpkg/status /opt/debian.txt
RUN python3 /tools/sbom.py /opt/site /opt/debian.txt > /app/sbom.cdx.json

FROM ${GPU_BASE_IMAGE} AS serve-gpu
ARG REVISION=unknown
ARG MODEL_DIGEST=none
LABEL org.opencontainers.image.title="pawl-serve-gpu" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      pawl.model.digest="${MODEL_DIGEST}"
COPY --from=build-gpu /opt/site /opt/site
COPY --from=build-gpu /app /app
COPY --from=build --chown=65532:65532 /data /data
ENV PYTHONPATH=/app:/opt/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HTTP_PORT=8000
# What the container toolkit goes by.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
USER 65532:65532
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "/app/serve/health.py"]
ENTRYPOINT ["python3", "-m", "serve", "--device", "cuda"]
CMD ["--model", "/model", "--host", "0.0.0.0", "--records", "/data/records.sqlite", "--derived", "/data"]

# -- train: every command of ours; also retrains, and fetches versions for the server ----------------------------------

FROM ${BUILD_IMAGE} AS build-train
COPY deploy/image_tools /tools
COPY requirements /requirements
# torch by itself, with what its build needs; all else is pinned whole.
RUN python3 -m pip install --no-cache-dir --no-compile --target /opt/site "$(grep '^torch==' /requirements/build.txt)" \
    && cd /requirements && for file in serve build train deploy; do grep -Ev '^(#|-r |torch==)' "$file.txt"; done > all.txt \
    && python3 -m pip install --no-cache-dir --no-compile --no-deps --upgrade --target /opt/site -r all.txt \
    && sh /tools/trim.sh /opt/site
COPY --from=build /app/serve /app/serve
COPY proto /app/proto
COPY train /app/train
COPY compress /app/compress
COPY deploy /app/deploy
COPY monitoring /app/monitoring
RUN sh /tools/compile.sh /app /opt/site
COPY --from=base /var/lib/dpkg/status /opt/debian.txt
RUN python3 /tools/sbom.py /opt/site /opt/debian.txt > /app/sbom.cdx.json

FROM ${BASE_IMAGE} AS train
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pawl-train" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build-train /opt/site /opt/site
COPY --from=build-train /app /app
# Caches of libraries go where a read-only root leaves room.
ENV PYTHONPATH=/app:/opt/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /app
USER 65532:65532
HEALTHCHECK NONE
ENTRYPOINT ["python3", "-m"]
CMD ["deploy", "--help"]
