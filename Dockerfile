# Octavo with its default model inside: starts offline, as a non-root user.
#   docker build -t octavo .        docker run --rm -p 8000:8000 octavo
# For the small CPU image give pip a folder or index of CPU builds of torch:
#   --build-arg PIP_FIND_LINKS=DIR   or   --build-arg PIP_EXTRA_INDEX_URL=URL
# For a GPU, with its kernels compiled in (GPUs of another kind compile their own):
#   docker build -t octavo:cuda --build-arg OCTAVO_CUDA_ARCH=sm_90 .
#   docker run --rm --gpus all -p 8000:8000 octavo:cuda
# Kernels are those of the default model, or of the one named by --build-arg OCTAVO_CUDA_MODEL=ID.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_FIND_LINKS
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/octavo
ENV PATH=/opt/octavo/bin:$PATH
# Dependencies first: this layer survives changes of our own code.
COPY pyproject.toml README.md LICENSE /src/
COPY server/octavo/__init__.py /src/server/octavo/__init__.py
RUN mkdir -p /src/kernels && pip install -q /src && pip uninstall -q -y octavo \
 && cd /opt/octavo/lib/python3*/site-packages \
 && rm -rf torch/test torch/include \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && find . -name '*.a' -delete
COPY server /src/server
COPY kernels /src/kernels
RUN pip install -q --no-deps /src
# The default model, its converted tokenizer and the machine code of the CPU kernels. On another
# kind of CPU the kernels are compiled anew at the first start.
ENV OCTAVO_CACHE=/opt/octavo-cache NUMBA_CACHE_DIR=/opt/octavo-cache
RUN octavo generate --device cpu --max-tokens 2 "The capital of France is"
# Kernels of a GPU, which need none to be compiled. Triton comes with CUDA builds of torch.
ARG OCTAVO_CUDA_ARCH
ARG OCTAVO_CUDA_MODEL
ENV TRITON_CACHE_DIR=/opt/octavo-cache/triton
RUN if [ -n "$OCTAVO_CUDA_ARCH" ]; then \
      pip install -q "triton>=3.6" \
      && octavo compile $OCTAVO_CUDA_MODEL --arch "$OCTAVO_CUDA_ARCH"; \
    fi && chmod -R a+rX /opt/octavo

FROM ${BASE_IMAGE}
# Triton builds its launcher with a C compiler, once and only where there is a GPU.
ARG OCTAVO_CUDA_ARCH
RUN if [ -n "$OCTAVO_CUDA_ARCH" ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
      && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --create-home --uid 10001 octavo
COPY --from=build /opt/octavo /opt/octavo
COPY --from=build --chown=10001:10001 /opt/octavo-cache /opt/octavo-cache
USER octavo
WORKDIR /home/octavo
ENV PATH=/opt/octavo/bin:$PATH PYTHONUNBUFFERED=1 \
    OCTAVO_CACHE=/opt/octavo-cache NUMBA_CACHE_DIR=/opt/octavo-cache \
    TRITON_CACHE_DIR=/opt/octavo-cache/triton
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["octavo", "serve"]
