"""Runs the commands and the Python examples of README.md and docs/ as they stand there.

    tests/clients/documents.py PROGRAM      such as target/debug/nbn, with nbn-fold beside it, built with --features dev

Works in a folder of its own that has what the documents speak of: photos, a checkpoint, labelled images. Ports are
replaced by a free one, `cargo run … --` by the program, and a training is shortened. A command that is not run here needs
an entry in ELSEWHERE that says why; an entry that no document has any more is an error, too.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
COLOURS = [(0, 0, 0), (170, 0, 0), (0, 170, 0), (0, 0, 170), (170, 170, 0), (170, 170, 170)]
LABELS = ["ape", "bee", "cow", "dog", "eel", "fox"]

# The beginning of a command or of an example, and why it is not run here.
ELSEWHERE = {
    "cargo test --features dev": ".ci/run runs it",
    "cargo install": "takes a build of its own; installs what `cargo build` builds",
    "pip install nbn-": "release/build makes the file; tried in empty environments before a release",
    "docker ": "needs a container engine; tried before a release",
    "python3 -m venv gpu": "fetches two gigabytes for a GPU; benches/gpu/run does the same on a machine with one",
    "cargo build --release --features full,cuda": ".ci/run checks it",
    "export LD_LIBRARY_PATH=$(echo gpu/": "as above",
    "target/release/nbn serve --device cuda": "needs a GPU",
    "kubectl ": "needs a cluster; tests/clients/deploy.py holds the files to Kubernetes' schemas",
    "grpcurl ": "a tool of its own; tests/clients/reflection.py asks the same with gRPC's own client",
    "python deploy/ray/score.py": "tests/clients/spread.py runs it",
    "install -d -o 10001": "needs root; belongs to the container",
    "cp -r out models/mine/.2": "tests/it/operations.rs swaps versions under load",
    "curl -X POST localhost:8081/v2/repository": "tests/it/operations.rs has an admin listener",
    "nbn serve --addr 0.0.0.0:8443": "tests/it/operations.rs serves TLS; nothing here listens on other interfaces",
    'curl --cacert ca.pem': "as above",
    "cargo run --release --features train --bin fold -- train --data CIFAR10_FOLDER": "takes an hour",
    "nbn fold export network.onnx": "tests/oracle/timm_end_to_end.py runs that page, with timm and torch",
    "nbn fold calibrate models/mine/1 --data photos/held-out": "as above",
    "nbn fold evaluate models/mine/1 --data photos/test": "as above",
    "nbn score --model models/mine --top-k 1 photos/test": "as above",
    "import json\nimport pathlib\n\nimport timm": "as above",
    "x = torch.randn(4, 3, 224, 224)": "needs torch; tests/it/field.rs takes files that were made so",
    "nbn fold export checkpoint.pth --expect": "as above",
    "nbn fold quantize models/mine/1": "the images here are too few to prove anything; tests/it/quantize.rs has more",
    "nbn fold evaluate models/mine/2 --data test/ --against": "as above",
}
SERVER = re.compile(r"^(nbn (serve|demo)|cargo run --release -- serve)")


def blocks(document):
    """Language and text of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / document).read_text(), re.S | re.M)


def commands(text):
    """The commands of a block, continued lines joined, remarks left out."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        line = re.sub(r"\s{2,}#.*$", "", line).strip()
        if line and not line.startswith("#"):
            yield line


class Tried:
    """A folder to run in, the running server, and what failed."""

    def __init__(self, program, folder):
        self.program, self.folder = program.resolve(), folder
        self.server, self.failed, self.ran = None, [], 0
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])
        self.environment = {
            **os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "no_proxy": "127.0.0.1,localhost",
            "PATH": f"{self.program.parent}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def adapted(self, command):
        """As it is run here."""
        command = re.sub(r"cargo run --release (--features \S+ )?--bin fold --", "nbn fold", command)
        command = command.replace("cargo run --release --", "nbn").replace("target/release/fold", "nbn fold")
        command = command.replace("--epochs 60", "--epochs 1 --batch 4 --input-size 32")
        if SERVER.match(command) and "--addr" not in command:
            command += f" --addr 127.0.0.1:{self.port}"
        if command.startswith("nbn demo"):
            command += " --no-browser"
        return command.replace("8080", self.port).replace("localhost", "127.0.0.1")

    def run(self, command, where):
        """Runs a command; a server stays until the next one."""
        adapted = self.adapted(command)
        if SERVER.match(adapted):
            self.stop()
            log = open(self.folder / "server.log", "wb")
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec {adapted}"], cwd=self.folder, env=self.environment, stdout=log, stderr=log)
            reason = self.wait()
        else:
            done = subprocess.run(["bash", "-c", adapted], cwd=self.folder, env=self.environment, text=True,
                                  capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
            reason = None if done.returncode == 0 else f"status {done.returncode}: {done.stderr[-600:]}"
            if adapted.startswith("curl") and '"results"' not in done.stdout and '"manifest"' not in done.stdout:
                reason = f"answer {done.stdout[:300]}"
        self.note(f"{where}: {command}", reason)

    def python(self, text, where):
        """Runs a Python example against the server."""
        text = text.replace("8080", self.port).replace("localhost", "127.0.0.1")
        done = subprocess.run([sys.executable, "-c", text], cwd=self.folder, env=self.environment, text=True,
                              capture_output=True, timeout=120)
        reason = None if done.returncode == 0 and done.stdout else f"status {done.returncode}: {done.stderr[-600:]}"
        self.note(f"{where}: {text.splitlines()[0]} …", reason)

    def wait(self):
        """Until the server is ready; why it is not."""
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2)
                return None
            except OSError:
                if self.server.poll() is not None:
                    break
                time.sleep(0.1)
        return (self.folder / "server.log").read_text()[-600:]

    def stop(self):
        """Ends the server, if one runs."""
        if self.server:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait(timeout=60)
            self.server = None

    def note(self, what, reason):
        self.ran += 1
        print(f"{'FAILED' if reason else 'ok'}  {what}" + (f"\n    {reason}" if reason else ""))
        if reason:
            self.failed.append(what)


def prepare(folder, program):
    """What the documents speak of."""
    for name in ("models", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "runs").mkdir()
    shutil.copy(ROOT / "examples/pictures/ship.jpg", folder / "photo.jpg")
    counts = [400, 200, 90, 40, 10, 5]
    (folder / "classes.csv").write_text(
        "label,count\n" + "".join(f"{label},{count}\n" for label, count in zip(LABELS, counts)))
    random = numpy.random.default_rng(1)
    for name, images in (("photos", 3), ("held-out", 7), ("train", 2), ("test", 8)):
        for number, label in enumerate(LABELS):
            (folder / name / label).mkdir(parents=True)
            for image in range(images):
                pixels = random.integers(0, 80, (40, 40, 3)) + numpy.array(COLOURS[number])
                Image.fromarray(pixels.astype(numpy.uint8)).save(folder / name / label / f"{image}.png")
    # The reader's checkpoint; what is inside tells that it is safetensors.
    subprocess.run([program, "fold", "train", "--data", "train", "--arch", "resnet8_w4", "--epochs", "12", "--batch", "6",
                    "--calibration-fraction", "0", "--out", "runs/own.safetensors"],
                   cwd=folder, check=True, capture_output=True)
    (folder / "runs/own.safetensors").rename(folder / "checkpoint.pth.tar")


def main():
    """Goes through the documents."""
    unused = set(ELSEWHERE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        tried = Tried(pathlib.Path(sys.argv[1]), folder)
        prepare(folder, tried.program)
        try:
            for document in DOCUMENTS:
                tried.stop()
                for model in folder.glob("models/[!c]*"):
                    shutil.rmtree(model)
                for language, text in blocks(document):
                    if language == "python":
                        entry = next((entry for entry in ELSEWHERE if text.startswith(entry)), None)
                        unused.discard(entry)
                        if entry is not None:
                            continue
                        if "read_parquet" in text:
                            subprocess.run([tried.program, "score", "--model", "models/cifar10-lt", "--format", "parquet",
                                            "--output", "rows.parquet", "examples/pictures"], cwd=folder, check=True,
                                           env=tried.environment, capture_output=True)
                        tried.python(text, document)
                        continue
                    for command in commands(text) if language == "sh" else ():
                        entry = next((entry for entry in ELSEWHERE if command.startswith(entry)), None)
                        unused.discard(entry)
                        if entry is None:
                            tried.run(command, document)
        finally:
            tried.stop()
    for entry in sorted(unused):
        tried.note(f"ELSEWHERE has {entry!r}", "no document has such a command")
    print(f"{tried.ran} tried, {len(tried.failed)} failed")
    sys.exit(1 if tried.failed else 0)


if __name__ == "__main__":
    main()
