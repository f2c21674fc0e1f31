# R²VPO on NVIDIA GPUs. CUDA comes with torch's wheels; the host brings the driver and NVIDIA's container toolkit.
#
#   docker build --file docker/gpu.Dockerfile --tag r2vpo:0.1.0-gpu .

FROM python:3.11.14-slim-bookworm

WORKDIR /opt/r2vpo

# The stack takes minutes and gigabytes; a change of the code alone does not build it again.
COPY docker/install.sh docker/
RUN bash docker/install.sh gpu system
COPY docker/gpu.txt docker/
COPY requirements/cpu.txt requirements/
RUN bash docker/install.sh gpu stack

COPY pyproject.toml README.md LICENSE ./
COPY r2vpo r2vpo
COPY rollout rollout
COPY replay replay
COPY learner learner
RUN bash docker/install.sh gpu r2vpo

COPY configs configs
COPY assets/quickstart-model assets/quickstart-model

ENV HF_HOME=/runs/huggingface \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0

# By number, so that Kubernetes can tell that it is not root.
USER 1000
VOLUME /runs
CMD ["r2vpo", "--help"]
