# hipa-deploy on Jetson, with JetPack's own TensorRT. Run these on the Jetson, in the root of the
# repository:
#
#   JetPack 6:  docker build -f docker/jetson.Dockerfile -t hipa-deploy .
#   JetPack 7:  docker build -f docker/jetson.Dockerfile -t hipa-deploy --build-arg EXTRA=jetson7 \
#                 --build-arg BASE=nvcr.io/nvidia/tensorrt:25.10-py3 .
#   cat /proc/device-tree/model > /tmp/nv_jetson_model
#   docker run --rm --runtime nvidia --ipc host -v "$PWD":/work \
#     -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro \
#     -v /tmp/nv_jetson_model:/tmp/nv_jetson_model:ro hipa-deploy hipa-doctor
#
# Docker hides the module's model and the release of Jetson Linux. The two files bring them back: the
# first decides the limits of a build, and an engine is bound to the second.
#
# Neither this file nor its images have been built or run by us: no Jetson and no Docker were at
# hand. tests/test_docker.py checks what it copies and installs. Its packages resolve for aarch64
# (docs/tutorials/jetson.md). An engine works only with the TensorRT that built it: build and run it
# in the same image.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*

# TensorRT's Python bindings are part of the image. They are searched for, and not imported, because
# the driver's libraries are there only at run time.
RUN python3 -c "import importlib.util as u, sys; \
        sys.exit(u.find_spec('tensorrt') is None and 'no TensorRT in BASE')" \
    && python3 -m venv --system-site-packages /opt/hipa-deploy
ENV PATH=/opt/hipa-deploy/bin:${PATH}

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY hipa_deploy hipa_deploy
COPY engines engines
COPY export export
COPY train train

# cuda-python must match the CUDA of the device, so its pins are removed.
ARG EXTRA=jetson6
RUN grep -v '^cuda-' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt ".[${EXTRA}]"

WORKDIR /work
CMD ["hipa-doctor"]
