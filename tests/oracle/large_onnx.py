"""Makes a network with 2.5 GB of weights in a file beside it, brings it to scores with the release `nbn`, and reports the
memory and the disk that each step takes.

    cargo build --release && python tests/oracle/large_onnx.py     # needs numpy, onnx, onnxruntime, pillow; 10 GB of disk

Fails when a step takes more than three times the size of the weights of memory, or all folders together more than three times
that of disk, or when the scores are not those of the network in ONNX Runtime's Python.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from PIL import Image

NBN = Path(__file__).parents[2] / "target" / "release" / "nbn"
WIDTH, LAYERS, CLASSES, SIDE = 10_240, 6, 8, 32


def make(folder):
    """A convolution with BatchNorm, six linear layers of 10,240 each way, and a classifier."""
    rng = np.random.default_rng(0)
    nodes, weights, at = [], [], 0
    with (folder / "weights.bin").open("wb") as data:

        def weight(name, values):
            nonlocal at
            raw = np.ascontiguousarray(values, dtype="<f4")
            tensor = TensorProto(name=name, dims=raw.shape, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", at), ("length", raw.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            raw.tofile(data)
            at += raw.nbytes
            weights.append(tensor)
            return name

        def normal(*shape, scale):
            return rng.standard_normal(shape, dtype="f4") * np.float32(scale)

        conv = [weight("conv.weight", normal(40, 3, 3, 3, scale=0.3))]
        nodes.append(helper.make_node("Conv", ["input", *conv], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]))
        norm = [weight(f"bn.{n}", abs(normal(40, scale=1.0)) + 0.5) for n in ("weight", "bias", "mean", "var")]
        nodes.append(helper.make_node("BatchNormalization", ["c", *norm], ["n"]))
        nodes += [helper.make_node("Relu", ["n"], ["r"]), helper.make_node("Flatten", ["r"], ["x0"])]
        for layer in range(LAYERS):
            linear = [
                weight(f"fc{layer}.weight", normal(WIDTH, WIDTH, scale=(2 / WIDTH) ** 0.5)),
                weight(f"fc{layer}.bias", normal(WIDTH, scale=0.1)),
            ]
            nodes.append(helper.make_node("Gemm", [f"x{layer}", *linear], [f"y{layer}"], transB=1))
            nodes.append(helper.make_node("Relu", [f"y{layer}"], [f"x{layer + 1}"]))
        head = [weight("head.weight", normal(CLASSES, WIDTH, scale=0.02)), weight("head.bias", normal(CLASSES, scale=0.1))]
        nodes.append(helper.make_node("Gemm", [f"x{LAYERS}", *head], ["logits"], transB=1))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "large.onnx")
    return at


def run(name, *command, size):
    """Runs a command; prints its seconds and its peak of resident memory, mapped files among it."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    peak, anonymous = 0, 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            values = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            peak = max(peak, int(values["VmHWM"].split()[0]) * 1024)
            anonymous = max(anonymous, int(values["RssAnon"].split()[0]) * 1024)
        except (OSError, KeyError):
            pass
        time.sleep(0.02)
    out, err = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{name} failed: {err.decode()}")
    seconds = time.monotonic() - began
    print(f"{name:<28} {seconds:6.1f} s  peak {peak / size:.2f} × the weights, of which not mapped {anonymous / size:.2f} ×")
    if peak > 3 * size:
        sys.exit(f"{name} took more than three times the weights")
    return out.decode()


def used(*folders):
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def main():
    root = Path(tempfile.mkdtemp(prefix="nbn-large-", dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        original = root / "original"
        original.mkdir()
        size = make(original)
        print(f"weights: {size / 1e9:.2f} GB")
        photo = root / "photo.png"
        pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype="u1")
        Image.fromarray(pixels).save(photo)
        bundle, cache = root / "models" / "large" / "1", root / "cache"
        settings = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--resize-to", str(SIDE))
        run("export", NBN, "fold", "export", original / "large.onnx", "--out", bundle, *settings, size=size)
        score = (NBN, "score", "--model", bundle, "--cache", cache, "--workers", "1", "--logits", photo)
        first = run("score, the cache empty", *score, size=size)
        second = run("score, from the cache", *score, size=size)
        disk = used(original, bundle, cache)
        print(f"disk: original, bundle and cache together {disk / size:.2f} × the weights")
        images = ((pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).transpose(2, 0, 1)[None].astype("f4")
        expected = onnxruntime.InferenceSession(original / "large.onnx").run(None, {"input": images})[0][0]
        for rows in (first, second):
            found = np.array(json.loads(rows.splitlines()[0])["logits"])
            difference = abs(found - expected).max() / expected.std()
            print(f"largest difference from ONNX Runtime in Python: {difference:.1e} standard deviations")
            if not difference < 1e-4:
                sys.exit("the logits differ")
        if disk > 3.01 * size:
            sys.exit("more than three times the weights of disk")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
