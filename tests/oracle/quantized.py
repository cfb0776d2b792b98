"""Quantises networks of several families, and measures them alone: operators, speed, memory, start.

    python tests/oracle/quantized.py WORK --fold target/release/fold --pictures FOLDER [--only NAME,...] [--rounds 11]

The networks have random weights, and statistics of the pictures: what they say means nothing, what they cost is right.
FOLDER has pictures whose names begin with their class and a dash. Ratios are of processor time, f32 / int8, one thread,
one picture at a time, the two networks in turn; median and range over the rounds. Needs torch, timm, onnx, onnxruntime.
"""

import argparse
import collections
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import onnx
import onnxruntime
import timm
import torch
from PIL import Image

import networks

FAMILIES = {
    "resnet50": lambda k: timm.create_model("resnet50", num_classes=k),
    "resnet18": lambda k: timm.create_model("resnet18", num_classes=k),
    "mobilenetv2": lambda k: timm.create_model("mobilenetv2_100", num_classes=k),
    "mobilenetv3": lambda k: timm.create_model("mobilenetv3_large_100", num_classes=k),
    "efficientnet": lambda k: timm.create_model("efficientnet_b0", num_classes=k),
    "densenet": lambda k: timm.create_model("densenet121", num_classes=k),
    "resnext50": lambda k: timm.create_model("resnext50_32x4d", num_classes=k),
    "ride": lambda k: networks.ImageNetResNet(experts=3, planes=(64, 128, 192, 384), classes=k),
    "vit_tiny": lambda k: timm.create_model("vit_tiny_patch16_224", num_classes=k),
    "convnext": lambda k: timm.create_model("convnext_atto", num_classes=k),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--fold", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    classes, x = folders(args.work, args.pictures)
    for name in args.only:
        first, second = (args.work / "models" / name / version for version in "12")
        if not second.exists():
            make(args, name, classes, x, first, second)
        report(name, first, second, x, args)


def folders(work, pictures):
    """A folder for each class, and 16 pictures as the networks take them."""
    files = sorted(pictures.glob("*-*.jpg"))
    classes = sorted({file.name.rsplit("-", 1)[0] for file in files})
    for file in files:
        place = work / "photos" / file.name.rsplit("-", 1)[0]
        place.mkdir(parents=True, exist_ok=True)
        if not (place / file.name).exists():
            shutil.copy(file, place)
    (work / "classes.csv").write_text("label,count\n" + "".join(f"{name},20\n" for name in classes))
    mean, std = numpy.array([0.485, 0.456, 0.406]), numpy.array([0.229, 0.224, 0.225])
    read = lambda file: numpy.asarray(Image.open(file).convert("RGB").resize((224, 224)), "float64") / 255  # noqa: E731
    x = [((read(file) - mean) / std).transpose(2, 0, 1) for file in files[:16]]
    return classes, torch.tensor(numpy.stack(x), dtype=torch.float32)


def make(args, name, classes, x, first, second):
    torch.manual_seed(0)
    model = FAMILIES[name](len(classes))
    model.train()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = None
        model(x)
    model.eval()
    file = args.work / f"{name}.onnx"
    torch.onnx.export(model, (x[:1],), file, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
                      dynamic_axes={"x": {0: "n"}, "y": {0: "n"}})
    run([args.fold, "export", file, "--classes", args.work / "classes.csv", "--preprocessing", "imagenet",
         "--out", first])
    started = time.time()
    print(run([args.fold, "quantize", first, "--data", args.work / "photos", "--out", second, "--unproved"]))
    print(f"{name}: quantised in {time.time() - started:.1f} s")


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr}")
    return "\n".join(line for line in done.stderr.splitlines() if line.split()[:1] and line.split()[0] in ("layers", "certificate"))


def report(name, first, second, x, args):
    sessions = []
    for bundle in (first, second):
        started = time.process_time()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.optimized_model_filepath = str(args.work / "optimised.onnx")
        session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
        starts = time.process_time() - started
        operators = collections.Counter(node.op_type for node in onnx.load(args.work / "optimised.onnx").graph.node)
        sessions.append((session, starts, operators))
    inputs = [{"images": x[n:n + 1].numpy()} for n in range(4)]
    outputs = [numpy.concatenate([session.run(["logits"], one)[0] for one in inputs]) for session, *_ in sessions]
    error = numpy.sqrt(((outputs[0] - outputs[1]) ** 2).mean()) / outputs[0].std()
    ratios = []
    for _ in range(args.rounds):
        times = []
        for session, *_ in sessions:
            started = time.process_time()
            for n in range(args.runs):
                session.run(["logits"], inputs[n % 4])
            times.append(time.process_time() - started)
        ratios.append(times[0] / times[1])
    ratios.sort()
    sizes = [sum(file.stat().st_size for file in bundle.glob("model.*")) for bundle in (first, second)]
    memory = [resident(bundle / "model.onnx") for bundle in (first, second)]
    print(f"{name}: f32/int8 {ratios[len(ratios) // 2]:.2f} [{ratios[0]:.2f}-{ratios[-1]:.2f}]; "
          f"files {sizes[0] / 1e6:.1f} and {sizes[1] / 1e6:.1f} MB; memory {memory[0]:.0f} and {memory[1]:.0f} MB; "
          f"opening {sessions[0][1]:.2f} and {sessions[1][1]:.2f} s; change of logits {error:.3f}")
    print("   ", dict(sessions[1][2].most_common()), flush=True)


def resident(path):
    """Megabytes that a process of its own holds after a run, less those that it holds without a network."""
    code = ("import sys, resource, onnxruntime, numpy; s = onnxruntime.InferenceSession(sys.argv[1], "
            "providers=['CPUExecutionProvider']) if sys.argv[1] else None; "
            "s and s.run(None, {'images': numpy.zeros((1, 3, 224, 224), 'f')}); "
            "print([int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS')][0])")
    of = lambda argument: int(subprocess.check_output([sys.executable, "-c", code, str(argument)]))  # noqa: E731
    return (of(path) - of("")) / 1024


if __name__ == "__main__":
    main()
