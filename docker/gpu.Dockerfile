# hipa-deploy for a desktop GPU. Run these in the root of the repository:
#
#   docker build -f docker/gpu.Dockerfile -t hipa-deploy .
#   docker run --rm --gpus all -v "$PWD":/work \
#     hipa-deploy hipa-generate emoji "3d emoji of a red apple"
#
# EXTRA is rtx or tensorrt. The extra rtx installs TensorRT-RTX from PyPI. The extra tensorrt needs
# several gigabytes of libraries from NVIDIA's index. The packages contain CUDA's runtime. The
# driver comes from the host, through NVIDIA's container toolkit.
#
# Neither this file nor its image has been built or run by us: no GPU and no Docker were at hand.
# tests/test_docker.py checks what it copies and installs. `make test` installs the same packages
# on a machine without a GPU.
ARG BASE=python:3.12-slim
FROM ${BASE}

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY hipa_deploy hipa_deploy
COPY engines engines
COPY export export
COPY train train

ARG EXTRA=rtx
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRA}]"

WORKDIR /work
CMD ["hipa-doctor"]
