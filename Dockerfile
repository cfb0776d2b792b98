# syntax=docker/dockerfile:1
# The server and batch scoring. Targets: cpu (the last, so the default), cuda. See README.md, "Container".
#   docker build -t nbn:cpu .
#   docker build -t nbn:cuda --target cuda .
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev nasm python3 python3-pip \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs openapi.yaml openapi.json ./
COPY src src
COPY models models
COPY examples/pictures examples/pictures
COPY benches/*.rs benches/
COPY tests/it tests/it
# ONNX Runtime's library comes from the build script; it is put beside the program, where it is looked for first.
ENV XDG_CACHE_HOME=/cache
RUN cargo build --profile dist --locked --no-default-features --features full --bin nbn \
 && mkdir /out \
 && cp target/dist/nbn /out/ \
 && cp /cache/nbn/onnxruntime-*/libonnxruntime.so.* /out/libonnxruntime.so

FROM build AS build-cuda
RUN cargo build --profile dist --locked --no-default-features --features full,cuda --bin nbn \
 && cp target/dist/nbn /out/

# ONNX Runtime with its CUDA 12 provider, and NVIDIA's libraries that it loads, out of their Python wheels.
FROM debian:bookworm-slim AS cuda-libraries
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-pip \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
COPY deploy/cuda-requirements.txt /
RUN pip install --no-cache-dir --no-deps --only-binary=:all: --target /wheels -r /cuda-requirements.txt \
 && mkdir /libraries \
 && mv /wheels/onnxruntime/capi/libonnxruntime*.so* /libraries/ \
 && mv /wheels/nvidia/*/lib/*.so* /libraries/ \
 && ln -sf "$(basename /libraries/libonnxruntime.so.1.*)" /libraries/libonnxruntime.so \
 && rm -rf /wheels

# The crates that the program is made of, as CycloneDX.
FROM rust:1.95-slim-bookworm AS sbom
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
RUN cargo install --locked cargo-cyclonedx@0.5.9
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs openapi.yaml openapi.json ./
COPY src src
COPY models models
COPY examples/pictures examples/pictures
COPY benches/*.rs benches/
COPY tests/it tests/it
RUN cargo cyclonedx --format json --spec-version 1.5 --no-default-features --features full --no-build-deps --override-filename sbom.cdx

# What an image has beside the program: certificates for object stores and OTLP, the model, the list of crates.
FROM debian:bookworm-slim AS system
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libstdc++6 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
COPY models /models
COPY --from=sbom /src/sbom.cdx.json /usr/share/doc/nbn/sbom.cdx.json
# Optimised networks. Writable by whatever user the container is run as, and so is a tmpfs or a volume mounted there.
RUN install -d -m 1777 /cache

# What both images are started with.
FROM scratch AS settings
# So that `docker exec NAME nbn …` finds it.
ENV PATH=/opt/nbn:/usr/bin:/bin
ENV NBN_ADDR=0.0.0.0:8080 NBN_MODELS=/models NBN_CACHE=/cache
LABEL org.opencontainers.image.title="nbn" \
      org.opencontainers.image.description="Serves image classifiers trained on long-tailed data, with calibrated scores" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["/opt/nbn/nbn", "health"]
ENTRYPOINT ["/opt/nbn/nbn"]
CMD ["serve"]

FROM settings AS cuda
COPY --from=system / /
COPY --from=cuda-libraries /libraries /opt/nbn
COPY --from=build-cuda /out/nbn /opt/nbn/nbn
# The provider finds NVIDIA's libraries here; the driver's own come from the container runtime.
ENV LD_LIBRARY_PATH=/opt/nbn NBN_DEVICE=auto NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Of Debian, only the files that the program and ONNX Runtime load, the certificates, and of the packages that they come
# from the records and the terms. There is no shell.
FROM system AS cpu-files
COPY --from=build /out /opt/nbn
COPY release/root /usr/local/bin/root
RUN root /root-of-cpu /opt/nbn/nbn /opt/nbn/libonnxruntime.so

FROM settings AS cpu
COPY --from=cpu-files /root-of-cpu /
