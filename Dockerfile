# syntax=docker/dockerfile:1
# The server alone, on the processor. Build: docker build -t nbn .   Run: see README.md, "Container".
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev nasm python3 python3-pip \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY src src
COPY benches benches
COPY tests/it tests/it
# ONNX Runtime's library comes from the build script; it is put beside the program, where it is looked for first.
ENV XDG_CACHE_HOME=/cache
RUN cargo build --release --locked --no-default-features --features serve --bin nbn \
 && mkdir /out \
 && cp target/release/nbn /out/ \
 && cp /cache/nbn/onnxruntime-*/libonnxruntime.so.* /out/libonnxruntime.so

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends libstdc++6 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
COPY --from=build /out /opt/nbn
COPY models /models
# Optimised networks. Writable by whatever user the container is run as, and so is a tmpfs or a volume mounted there.
RUN install -d -m 1777 /cache
ENV NBN_ADDR=0.0.0.0:8080 NBN_MODELS=/models NBN_CACHE=/cache
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["/opt/nbn/nbn", "health"]
ENTRYPOINT ["/opt/nbn/nbn"]
CMD ["serve"]
