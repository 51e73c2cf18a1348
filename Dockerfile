# The CPU stack with the quickstart's model in it. Build and try:
#     docker build -t openrlhf-sgpo .
#     docker run --rm --shm-size 2g -v "$PWD/runs:/openrlhf_sgpo/runs" openrlhf-sgpo make quickstart
FROM python:3.12-slim-trixie
# vLLM's CPU build loads libnuma; Ray's dashboard and DeepSpeed call ps and git.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libnuma1 make procps \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /openrlhf_sgpo
# Layers of gigabytes depend on the lock alone.
COPY Makefile setup.py pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY openrlhf_sgpo/__init__.py openrlhf_sgpo/__init__.py
RUN make install
COPY . .
# Files of a fresh checkout may be younger than the installation; the layers above say that it is up to date.
RUN touch .venv/.installed && make build/smollm2/config.json
ENV PATH=/openrlhf_sgpo/.venv/bin:$PATH
CMD ["openrlhf-sgpo"]
