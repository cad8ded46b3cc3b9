# Two targets:
#
#     docker build --tag megatron-simct .                                                     # GPU, from NGC's PyTorch
#     docker build --tag megatron-simct:cpu --target cpu --build-arg BASE_IMAGE=debian:bookworm .
#
# Both end with the unit tests and run as a user without rights. For a cluster:
#
#     enroot import --output simct.sqsh dockerd://megatron-simct        # cluster.container.runtime: pyxis
#     apptainer build simct.sif docker-daemon://megatron-simct:latest   # cluster.container.runtime: apptainer
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.02-py3

# A CPU image: Debian's Python and the pinned packages. Where the package index serves a CUDA build of torch, give
# TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS cpu
ARG TORCH_INDEX_URL=
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates=* python3=3.* python3-venv=3.* \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --create-home --uid 10001 simct
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/megatron_simct
COPY requirements.txt requirements-test.txt ./
# hadolint ignore=DL3013
RUN torch=$(grep '^torch==' requirements.txt) \
    && pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch" \
    && pip install --no-cache-dir --requirement requirements-test.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . && chown --recursive simct .
USER 10001
RUN OMP_NUM_THREADS=1 python -m pytest -p no:cacheprovider --numprocesses 2 --dist loadfile tests/unit \
    && rm -rf /tmp/pytest-of-*
ENTRYPOINT []
CMD ["bash"]

# The GPU image keeps the base's CUDA, torch, TransformerEngine and Apex, unless a version says otherwise.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS gpu
ARG MEGATRON_CORE_VERSION=0.16.1
ARG TRANSFORMER_ENGINE_VERSION=
ARG APEX_REVISION=
# megatron-core 0.16.1 declares TransformerEngine >= 2.9 and < 2.12: where the base has another one, name one of these in
# TRANSFORMER_ENGINE_VERSION. The base may need a GPU to import TransformerEngine, which a builder seldom has: 0 leaves the tests out.
ARG RUN_TESTS=1
RUN id simct > /dev/null 2>&1 || useradd --create-home --uid 10001 simct
WORKDIR /opt/megatron_simct
# pyproject.toml asks for torch >= 2.10: the base must bring it.
RUN python -c 'import torch; v = torch.__version__; assert tuple(map(int, v.split(".")[:2])) >= (2, 10), v'
COPY requirements.txt requirements-test.txt ./
RUN grep --invert-match --extended-regexp '^(torch|megatron-core|numpy)==' requirements.txt > /tmp/packages.txt \
    && pip install --no-cache-dir --requirement /tmp/packages.txt \
        "megatron-core==${MEGATRON_CORE_VERSION}" hypothesis==6.170.15 pytest==9.2.0 pytest-xdist==3.8.0 transformers==5.24.0 \
    && rm /tmp/packages.txt
RUN if [ -n "$TRANSFORMER_ENGINE_VERSION" ]; then \
        pip install --no-cache-dir --no-build-isolation "transformer-engine[pytorch]==$TRANSFORMER_ENGINE_VERSION"; \
    fi \
    && if [ -n "$APEX_REVISION" ]; then \
        git clone https://github.com/NVIDIA/apex /tmp/apex \
        && git -C /tmp/apex checkout "$APEX_REVISION" \
        && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation /tmp/apex \
        && rm -rf /tmp/apex; \
    fi
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . && chown --recursive simct .
USER 10001
RUN if [ "$RUN_TESTS" = 1 ]; then \
        OMP_NUM_THREADS=1 python -m pytest -p no:cacheprovider tests/unit && rm -rf /tmp/pytest-of-*; \
    fi
CMD ["bash"]
