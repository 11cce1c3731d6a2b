# For CPUs:  docker build --tag tuner .
# For GPUs:  docker build --tag tuner --build-arg BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime .
#            docker run --gpus all --shm-size 8g --volume "$PWD:/work" tuner train my_config.py
# The CPU image has PyPI's torch, with CUDA libraries that it does not use; --build-arg TORCH_INDEX=URL of an index of
# torch's CPU builds makes it gigabytes smaller.
ARG BASE=python:3.12-slim
# hadolint ignore=DL3006
FROM ${BASE}

ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    HF_HOME=/work/.cache/huggingface \
    TUNER_CACHE=/work/.cache/tuner

# A compiler for triton's kernels, git for the commit in versions.json.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends gcc libc6-dev git && \
    rm -rf /var/lib/apt/lists/*

# Where the base image brings torch, that one stays: it fits the image's CUDA.
# hadolint ignore=DL3013
RUN if ! python -c 'import torch'; then \
        pip install 'torch>=2.11,<2.14' ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}; \
    fi

COPY pyproject.toml constraints.txt README.md LICENSE NOTICE /source/
COPY tuner /source/tuner
COPY configs /source/configs
COPY data_templates /source/data_templates
RUN grep --invert-match '^torch==' /source/constraints.txt > /tmp/constraints.txt && \
    pip install --constraint /tmp/constraints.txt /source

# Runs are written to the mounted folder, as the user who owns it: docker run --user "$(id -u):$(id -g)".
WORKDIR /work
ENTRYPOINT ["tuner"]
CMD ["--help"]
