# hipa-deploy for a desktop GPU. From the repository's root:
#
#   docker build -f docker/gpu.Dockerfile -t hipa-deploy .
#   docker run --rm --gpus all -v "$PWD":/work hipa-deploy hipa-generate emoji "3d emoji of a red apple"
#
# EXTRA is rtx (TensorRT-RTX, from PyPI) or tensorrt (whose libraries, gigabytes, come from NVIDIA's index). CUDA's
# runtime is in the packages and the driver comes from the host, through NVIDIA's container toolkit.
#
# Neither this recipe nor its image has been built or run by us: no GPU and no Docker were at hand. What it copies and
# installs is checked by tests/test_docker.py; the same packages are installed, without a GPU, by `make test`.
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
