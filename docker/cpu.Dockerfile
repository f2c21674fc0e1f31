# R²VPO without a GPU: the stack of `make quickstart`.
#
#   docker build --file docker/cpu.Dockerfile --tag r2vpo:0.1.0-cpu .

FROM python:3.11.14-slim-bookworm

WORKDIR /opt/r2vpo

# The stack takes minutes and gigabytes; a change of the code alone does not build it again.
COPY docker/install.sh docker/
RUN bash docker/install.sh cpu system
COPY requirements/cpu.txt requirements/
RUN bash docker/install.sh cpu stack

COPY pyproject.toml README.md LICENSE ./
COPY r2vpo r2vpo
COPY rollout rollout
COPY replay replay
COPY learner learner
RUN bash docker/install.sh cpu r2vpo

COPY configs configs
COPY assets/quickstart-model assets/quickstart-model

ENV HF_HOME=/runs/huggingface \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0

# By number, so that Kubernetes can tell that it is not root.
USER 1000
VOLUME /runs
CMD ["r2vpo", "--help"]
