# hipa-serve: an image service on the CPU, or with EXTRA=rtx on a desktop GPU. Run these in the root
# of the repository:
#
#   docker build -f docker/serve.Dockerfile -t hipa-serve .
#   openssl rand -hex 16 > key.txt
#   docker run --rm -p 127.0.0.1:8000:8000 -e HIPA_API_KEYS="$(cat key.txt)" \
#     hipa-serve hipa-serve emoji --host 0.0.0.0
#
# Its page and its clients then need the key in key.txt.
#
# docker/compose.yml starts it together with Prometheus. `docker stop` sends SIGTERM: the service ends
# after the requests that it has accepted, for which docker waits 10 seconds unless --stop-timeout
# says more.
#
# Neither this file nor its image has been built or run by us: no Docker was at hand.
# tests/test_docker.py checks what it copies and installs.
ARG BASE=python:3.12-slim
FROM ${BASE}

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY hipa_deploy hipa_deploy
COPY engines engines
COPY export export
COPY train train

ARG EXTRA=openvino
RUN pip install --no-cache-dir -c constraints.txt ".[serve,${EXTRA}]"

# A service needs no rights: it reads its bundles. It writes uploads of more than 1 MiB into /tmp, for
# as long as their request takes, and compiled models into /home/hipa/.cache, for the next start: keep
# them with `docker run -v hipa-cache:/home/hipa`. With --read-only give it --tmpfs /tmp.
RUN useradd --system --create-home hipa
USER hipa

WORKDIR /work
EXPOSE 8000
CMD ["hipa-doctor"]
