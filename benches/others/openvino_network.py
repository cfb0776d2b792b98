#!/usr/bin/env python3
"""A bundle's network, its 8-bit version, and OpenVINO's own, alone: one thread, one picture at a time, in turn.

    pip install onnxruntime==1.28.0 openvino nncf pillow
    python3 benches/others/openvino_network.py models/mine/1 models/mine/2 --pictures FOLDER

Prints the median of each one's processor time for a picture over the rounds, and of its ratio to the first. NNCF
quantises the first network with up to 64 of the pictures; that it names the same class as the first for so many of them is
printed, too.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import nncf
import numpy as np
import onnxruntime
import openvino
from PIL import Image


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    settings = json.loads((args.first / "manifest.json").read_text())["preprocessing"]
    crop = settings["crop"] if isinstance(settings["crop"], int) else settings["crop"][0]
    files = sorted(args.pictures.rglob("*.jpg"))[:64]
    x = [prepared(file, crop, settings) for file in files]
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    first, second = (core.read_model(bundle / "model.onnx") for bundle in (args.first, args.second))
    own = nncf.quantize(core.read_model(args.first / "model.onnx"), nncf.Dataset(x), subset_size=len(x))
    runs = {
        "ONNX Runtime, f32": runtime(args.first),
        "ONNX Runtime, nbn's 8 bits": runtime(args.second),
        "OpenVINO, f32": compiled(core, first, options),
        "OpenVINO, nbn's 8 bits": compiled(core, second, options),
        "OpenVINO, NNCF's 8 bits": compiled(core, own, options),
    }
    times = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.process_time()
            for n in range(args.runs):
                run(x[n % len(x)])
            times[name].append((time.process_time() - started) / args.runs)
    named = {name: [int(np.argmax(run(one))) for one in x] for name, run in runs.items()}
    reference = "ONNX Runtime, f32"
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[reference], taken))
        same = np.mean([a == b for a, b in zip(named[reference], named[name])])
        print(f"{name}: {1000 * statistics.median(taken):.2f} ms, {ratio:.2f} times as fast; the same class for "
              f"{100 * same:.1f} % of {len(x)} pictures")


def prepared(file, crop, settings):
    image = np.asarray(Image.open(file).convert("RGB").resize((crop, crop)), "float32") / 255
    image = (image - np.array(settings["mean"], "float32")) / np.array(settings["std"], "float32")
    return image.transpose(2, 0, 1)[None].astype("float32")


def runtime(bundle):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["logits"], {"images": x})[0][0]


def compiled(core, model, options):
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return lambda x: request.infer({"images": x})["logits"][0]


if __name__ == "__main__":
    main()
