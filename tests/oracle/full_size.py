"""Exports full-size checkpoints of every layout with the release `fold` and compares the bundles with PyTorch.

    cargo build --release && python tests/oracle/full_size.py     # needs torch, onnx, onnxruntime

Prints a table; fails when a difference exceeds 1e-4 of the logits' standard deviation and twice PyTorch's own
f32-to-f64 difference, when an argmax changes, or when a norm is left in the graph.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

import networks

FOLD = Path(__file__).parents[2] / "target" / "release" / "fold"


@torch.no_grad()
def check(name, seed, folder):
    arch, model = networks.full_size(name)
    networks.enliven(model, seed, tiny_variances=seed % 2 == 1)
    checkpoint, bundle = folder / f"{name}.pth.tar", folder / name / "1"
    networks.save(model, arch, checkpoint, prefix="module." if seed % 2 else "")
    keys = len(model.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
    single = model(images).double()
    exact = model.double()(images.double())
    del model
    began = time.time()
    command = ["/usr/bin/time", "-v", FOLD, "export", checkpoint, "--out", bundle]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.time() - began
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    megabytes = int(re.search(r"Maximum resident set size.*: (\d+)", done.stderr)[1]) / 1024
    path = str(bundle / "model.onnx")
    onnx.checker.check_model(path, full_check=True)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]).double()
    spread = exact.std().item()
    difference = (found - exact).abs().max().item() / spread
    own = (single - exact).abs().max().item() / spread
    left = operators & {"BatchNormalization", "ReduceL2", "LpNormalization", "Div", "Sqrt"}
    same = bool((found.argmax(1) == exact.argmax(1)).all())
    good = difference <= max(1e-4, 2 * own) and same and not left
    print(f"{name:<24} {keys:>4} keys  fold {difference:.1e}  torch f32 {own:.1e}  argmax {'same' if same else 'CHANGED'}  "
          f"{seconds:.1f} s  {megabytes:.0f} MB  {'' if good else 'FAILED ' + str(left)}", flush=True)
    checkpoint.unlink()
    return good


def main():
    names = sys.argv[1:] or list(networks.LAYOUTS)
    with tempfile.TemporaryDirectory() as folder:
        results = [check(name, seed, Path(folder)) for seed, name in enumerate(networks.LAYOUTS) if name in names]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
