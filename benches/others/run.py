#!/usr/bin/env python3
"""nbn beside the servers that people would otherwise write, on one machine, in one run.

    cargo build --release && python3 benches/others/run.py
    python3 benches/others/run.py --model models/mine/1 --image photo.jpg --connections 16 --seconds 20 --rounds 3

Each server gets the same network, the same picture, and a process or session of one thread for each processor. They
take turns; what is printed is each one's median of the rounds, and the median of the rounds' ratios to nbn: machines
change their speed from one minute to the next. `start` is from the start of the program to the first answer; `memory`
is the proportional set size of all its processes after the load. Needs wrk (a Debian package); the Python packages go
into target/others/, once.
"""

import argparse
import base64
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMMON = ["onnxruntime==1.28.0", "numpy==2.4.6", "pillow==13.0.0"]
PACKAGES = {
    "fastapi": ["fastapi==0.165.0", "uvicorn[standard]==0.54.0"],
    "litserve": ["litserve==0.2.19"],
    # Later loops fail in its workers.
    "mlserver": ["mlserver==1.7.1", "uvloop==0.21.0"],
    "bentoml": ["bentoml==1.4.40"],
    "ray": ["ray[serve]==2.60.0"],
}


# Servers that need no Python; the second one when there is a bundle for it.
OURS = ("nbn", "nbn-int8")


def python(name, venvs):
    folder = venvs / name
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin/pip", "install", "-q", *COMMON, *PACKAGES[name]], check=True)
        (folder / "ready").touch()
    return folder / "bin"


def commands(name, binaries, port, options, scratch):
    """How `name` is started, what it needs in its environment, and where and how a picture is sent to it."""
    image, port, workers = options.image.read_bytes(), str(port), str(options.workers)
    b64 = base64.b64encode(image).decode()
    as_json = {"content-type": "application/json"}
    if name in OURS:
        bundle = options.quantized if name == "nbn-int8" else options.model
        repository, model = bundle.parent.parent, bundle.parent.name
        line = [options.program, "serve", "--addr", f"127.0.0.1:{port}", "--models", repository, "--workers", workers]
        line += ["--default-model", model, "--versions", bundle.name, "--cache", scratch / "cache"]
        return line, {}, "/v1/classify", {"content-type": "image/jpeg"}, image
    if name == "fastapi":
        line = [binaries / "uvicorn", "fastapi_server:app", "--port", port, "--workers", workers]
        return [*line, "--log-level", "warning"], {}, "/classify", {"content-type": "image/jpeg"}, image
    if name == "litserve":
        body = json.dumps({"image": b64}).encode()
        return [binaries / "python", "litserve_server.py", port, workers], {}, "/classify", as_json, body
    if name == "mlserver":
        folder = scratch / "mlserver"
        folder.mkdir(exist_ok=True)
        settings = {"http_port": int(port), "grpc_port": free_port(), "metrics_port": free_port(), "host": "127.0.0.1"}
        settings |= {"parallel_workers": int(workers), "debug": False}
        (folder / "settings.json").write_text(json.dumps(settings))
        model = {"name": "classifier", "implementation": "mlserver_runtime.Classifier"}
        (folder / "model-settings.json").write_text(json.dumps(model))
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [b64]}
        body = json.dumps({"inputs": [tensor | {"parameters": {"content_type": "base64"}}]}).encode()
        return [binaries / "mlserver", "start", folder], {}, "/v2/models/classifier/infer", as_json, body
    if name == "bentoml":
        body = json.dumps({"image": b64}).encode()
        line = [binaries / "bentoml", "serve", "bentoml_server:Classifier", "--port", port, "--host", "127.0.0.1"]
        return line, {"WORKERS": workers, "BENTOML_DO_NOT_TRACK": "1"}, "/classify", as_json, body
    if name == "ray":
        line = [binaries / "python", "ray_server.py", port, workers]
        return line, {"RAY_USAGE_STATS_ENABLED": "0"}, "/classify", {"content-type": "image/jpeg"}, image
    raise ValueError(name)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def ask(url, headers, body):
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


def session_of(leader):
    """The processes of the session that `leader` began."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == leader:
                    found.append(int(folder.name))
            except OSError:
                pass
    return found


def descendants(root):
    """`root` and the processes below it, whatever session they are in."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                pass
    found, fresh = {root}, {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found | set(session_of(root))


def memory_mib(root):
    total = 0
    for pid in descendants(root):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss:\s+(\d+)", rollup, re.M)[1])
        except (OSError, TypeError):
            pass
    return total / 1024


def load(url, headers, body, options, scratch):
    (scratch / "body").write_bytes(body)
    lines = [f'wrk.method = "POST"', f'wrk.body = io.open("{scratch / "body"}", "rb"):read("*a")']
    lines += [f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()]
    lines += [
        "done = function(summary, latency, requests)",
        '  io.write(string.format("RESULT %f %f %f %d\\n", summary.requests / summary.duration * 1e6,'
        " latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, summary.errors.status + summary.errors.read"
        " + summary.errors.write + summary.errors.timeout + summary.errors.connect))",
        "end",
    ]
    (scratch / "load.lua").write_text("\n".join(lines))
    command = ["wrk", "-t1", f"-c{options.connections}", f"-d{options.seconds}s", "--timeout", "30s"]
    out = subprocess.run([*command, "-s", scratch / "load.lua", url], capture_output=True, text=True, check=True).stdout
    rate, p50, p99, errors = map(float, re.search(r"RESULT (\S+) (\S+) (\S+) (\S+)", out).groups())
    return {"rate": rate, "p50": p50, "p99": p99, "errors": errors}


def measure(name, binaries, options, scratch):
    port = free_port()
    line, extra, path, headers, body = commands(name, binaries, port, options, scratch)
    environment = os.environ | extra | {"BUNDLE": str(options.model), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    url = f"http://127.0.0.1:{port}{path}"
    with open(scratch / f"{name}.log", "ab") as log:
        began = time.monotonic()
        server = subprocess.Popen(line, cwd=HERE, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            try:
                answer = ask(url, headers, body)
                break
            except OSError as error:
                if server.poll() is not None or time.monotonic() - began > 180:
                    print((scratch / f"{name}.log").read_text()[-3000:], file=sys.stderr)
                    raise SystemExit(f"{name} does not answer: {error}")
                time.sleep(0.005)
        start = time.monotonic() - began
        if not b"label" in answer:
            raise SystemExit(f"{name} answered {answer[:300]}")
        # Every worker warm.
        load(url, headers, body, argparse.Namespace(connections=options.connections, seconds=2), scratch)
        result = load(url, headers, body, options, scratch)
        return result | {"start": start, "memory": memory_mib(server.pid)}
    finally:
        ours = descendants(server.pid)
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            pass
        for pid in ours:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/cifar10-lt/1", help="a bundle")
    parser.add_argument("--quantized", type=Path, help="the same in 8 bits, as `nbn fold quantize` makes it: nbn-int8")
    parser.add_argument("--image", type=Path, required=True, help="a JPEG")
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/nbn")
    parser.add_argument("--servers", default="nbn," + ",".join(PACKAGES))
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in ("model", "image", "program"):
        setattr(options, name, getattr(options, name).resolve(strict=True))
    if not shutil.which("wrk"):
        raise SystemExit("wrk is missing: apt-get install wrk")
    names = options.servers.split(",")
    if options.quantized:
        options.quantized = options.quantized.resolve(strict=True)
        names.insert(1, "nbn-int8")
    venvs = ROOT / "target/others"
    binaries = {name: None if name in OURS else python(name, venvs) for name in names}
    figures = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        for round in range(options.rounds):
            for name in names:
                figures[name].append(measure(name, binaries[name], options, Path(scratch)))
                print(f"round {round + 1}", name, {k: round_(v) for k, v in figures[name][-1].items()}, flush=True)
    print(f"\n{options.model.parent.name}, {options.workers} workers, {options.connections} connections, "
          f"{options.image.stat().st_size} bytes, median of {options.rounds} rounds of {options.seconds} s\n")
    print("| | images/s | p50 ms | p99 ms | memory MiB | start s | errors |\n|---|---|---|---|---|---|---|")
    for name in names:
        m = {key: statistics.median(f[key] for f in figures[name]) for key in figures[name][0]}
        print(f"| {name} | {m['rate']:.1f} | {m['p50']:.1f} | {m['p99']:.1f} | {m['memory']:.0f} | {m['start']:.2f} "
              f"| {m['errors']:.0f} |")
    others = [name for name in names if name != "nbn"]
    if "nbn" in names and others:
        print("\n| ÷ nbn, round by round | images/s | p50 | p99 | memory | start |\n|---|---|---|---|---|---|")
        for name in others:
            both = list(zip(figures[name], figures["nbn"]))
            ratios = (statistics.median(f[k] / n[k] for f, n in both) for k in ("rate", "p50", "p99", "memory", "start"))
            print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def round_(value):
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
