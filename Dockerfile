# Two images from one file:
#
#   docker build --target cpu -t megatron_ponder:cpu .   for the tests and the quickstart; no GPU needed
#   docker build --target gpu -t megatron_ponder:gpu .   for training; torch, NCCL, TransformerEngine
#                                                        and apex are those of the base image
#
#   docker run --rm megatron_ponder:cpu                  runs make test
#   docker run --rm --gpus all --ipc host -v /data:/data -v $PWD/runs:/workspace/megatron_ponder/runs \
#       megatron_ponder:gpu torchrun --nproc-per-node 8 -m megatron_ponder.pretrain --config ...

FROM python:3.11-slim-bookworm AS cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace/megatron_ponder
# Install the environment first: it changes less often than the code.
COPY setup.py pyproject.toml Makefile ./
COPY megatron_ponder/__init__.py megatron_ponder/installation.py megatron_ponder/
RUN make install
COPY . .
# The tests list the project's files with git.
RUN git init --quiet && git add --all
CMD ["make", "test"]

FROM nvcr.io/nvidia/pytorch:26.06-py3 AS gpu
WORKDIR /workspace/megatron_ponder
COPY . .
# The base image pins its packages through PIP_CONSTRAINT. Its torch, TransformerEngine and apex are
# built for each other and for its CUDA and cuDNN, so pip must not replace them.
RUN versions='import torch, triton; print(torch.__version__, triton.__version__)' \
    && before=$(python -c "$versions") \
    && PIP_CONSTRAINT= pip install --no-cache-dir --editable '.[dev]' \
    && test "$before" = "$(python -c "$versions")" \
    && python -c "import torch, megatron.core, megatron_ponder"
CMD ["python", "-m", "megatron_ponder.pretrain", "--help"]
