# docker build -t dart-eval .                                                         for CPUs
# docker build -t dart-eval --build-arg TORCH_INDEX=https://pypi.org/simple .         for NVIDIA GPUs
# docker run --rm -v "$PWD:/work" -v dart-eval:/cache dart-eval run --model gpt2 --tasks arc_easy --limit 20
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY dart_eval dart_eval
COPY tasks tasks
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim
# Where torch comes from: its builds without CUDA, or those with it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The kernels for CPUs are compiled on first use.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch --index-url "$TORCH_INDEX"
RUN --mount=type=bind,from=build,source=/wheel,target=/wheel \
    pip install --no-cache-dir "$(echo /wheel/*.whl)[gguf,peft,tasks]"
RUN useradd --create-home --uid 1000 dart && mkdir /work /cache && chown dart /work /cache
ENV HF_HOME=/cache/huggingface DART_EVAL_CACHE=/cache/dart-eval
VOLUME /cache
WORKDIR /work
USER 1000
ENTRYPOINT ["dart-eval"]
CMD ["--help"]
