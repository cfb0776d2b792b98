"""images/s of `nbn fold train` beside PyTorch's: the same network, batch and threads, in turn, medians.

    cargo build --release --features train --bin fold
    python benches/others/training.py [--fold target/release/fold] [--arch resnet20] [--batch 64] [--threads 2]

Needs torch and numpy. The pictures are noise in CIFAR-10's binary form; crop and flip on both sides. Memory is the peak of the
whole process.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def pytorch(args):
    """One epoch in this process: images/s."""
    sys.path.insert(0, str(ROOT / "examples/pytorch"))
    import torch
    import torch.nn.functional as F
    from nbn import CifarResNet
    from train import augment

    torch.set_num_threads(args.threads)
    model = CifarResNet(int(args.arch.removeprefix("resnet")), 10, "nbn", "linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(args.images, 3, 32, 32), torch.randint(0, 10, (args.images,))
    begun = time.monotonic()
    for x, y in zip(images.split(args.batch), labels.split(args.batch)):
        optimizer.zero_grad()
        F.cross_entropy(model(augment(x, generator)), y).backward()
        optimizer.step()
    print(args.images / (time.monotonic() - begun), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def ours(args, folder):
    out = Path(folder) / "run.safetensors"
    command = [args.fold, "train", "--data", str(Path(folder) / "train.bin"), "--dataset", "cifar10", "--arch", args.arch,
               "--epochs", "1", "--batch", str(args.batch), "--threads", str(args.threads), "--calibration-fraction", "0",
               "--out", str(out), "--overwrite"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Of this child alone: RUSAGE_CHILDREN would be the largest of all so far.
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}"
    return json.loads(out.with_suffix(".metrics.jsonl").read_text())["images_per_second"], usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", default=str(ROOT / "target/release/fold"))
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return pytorch(args)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        records = generator.integers(0, 256, (args.images, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(args.images) % 10
        records.tofile(Path(folder) / "train.bin")
        for _ in range(args.rounds):
            mine, memory = ours(args, folder)
            own = subprocess.run([sys.executable, __file__, "--one", *sys.argv[1:]], check=True, capture_output=True, text=True)
            theirs, torch_memory = map(float, own.stdout.split())
            rows.append((mine, memory, theirs, torch_memory))
            print(f"fold {mine:.1f}/s, PyTorch {theirs:.1f}/s, ratio {mine / theirs:.3f}", flush=True)
    mine, memory, theirs, torch_memory = (statistics.median(column) for column in zip(*rows))
    print(f"median: fold {mine:.1f}/s, {memory:.0f} MiB; PyTorch {theirs:.1f}/s, {torch_memory:.0f} MiB; "
          f"ratio {statistics.median(r[0] / r[2] for r in rows):.3f}")


if __name__ == "__main__":
    main()
