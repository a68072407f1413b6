# One machine: everything but a cluster. From the repository's root:
#   docker build --tag twotower --build-arg COMMIT="$(git rev-parse --short=12 HEAD)" .
#   docker run --rm --gpus all --shm-size 2g --user "$(id -u):$(id -g)" --volume "$PWD/data:/data" twotower \
#     python -m pipeline prepare --source digits --output /data/digits
# Leave --gpus out on a machine without one. Its commands were checked one by one in a new virtual environment; the image
# itself has not been built by this project's tests, which have no Docker daemon.
# A tag may move: --build-arg BASE=python:3.11-slim-bookworm@sha256:... builds on the image that you have looked at.
ARG BASE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM $BASE

# g++ compiles the trainer's kernels at their first use; without it the same is done by torch operations, slower.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt requirements.lock README.md LICENSE ./
RUN pip install --no-cache-dir --require-hashes --requirement requirements.lock
COPY twotower twotower
COPY pipeline pipeline
COPY trainer trainer
COPY cluster cluster
COPY configs configs
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

ARG COMMIT=""
# Any user may run it (--user): compiled kernels, matplotlib's fonts and Ray's session go to /tmp.
ENV TWOTOWER_COMMIT=$COMMIT HOME=/tmp PYTHONUNBUFFERED=1
USER 1000
CMD ["python", "-m", "trainer", "--help"]
