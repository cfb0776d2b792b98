"""What NBN changes inside: effective BatchNorm weights and feature strength, from the checkpoints that run.py left.

    python3 results/distributions.py --data CIFAR10_FOLDER --name cifar10-lt

Writes results/NAME/distributions.json: for every run the effective weights (γ, or α·γ/(‖γ‖ + 1e-6)) of each residual branch's last
norm in the last stage, and per class the mean Euclidean norm of the pooled features of its test images. The network is
examples/pytorch's, loaded strictly. Needs torch, numpy and safetensors.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/pytorch"))
from nbn import NORM_EPSILON, CifarResNet, NormalizedBatchNorm2d  # noqa: E402

from run import LOSSES, VARIANTS, insert, stem  # noqa: E402

MEAN = np.array([0.4914, 0.4822, 0.4465], dtype=np.float32)[:, None, None]
STD = np.array([0.2023, 0.1994, 0.2010], dtype=np.float32)[:, None, None]


def pictures(path, labels):
    """Normalised pictures [N, 3, 32, 32] and their labels; `labels` bytes stand before each picture, the last of which counts."""
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, labels + 3072)
    pixels = records[:, labels:].reshape(-1, 3, 32, 32).astype(np.float32) / 255
    return torch.from_numpy((pixels - MEAN) / STD), records[:, labels - 1].astype(np.int64)


def network(path, classes):
    """The network of a finished run, or nothing."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["nbn.recipe"])
    if int(metadata["nbn.epoch"]) < recipe["epochs"]:
        return None
    depth, _, width = recipe["arch"].removeprefix("cifar_resnet").partition("_w")
    net = CifarResNet(int(depth), classes, recipe["norm"], recipe["head"], recipe["shortcut"].upper(), int(width or 16))
    net.load_state_dict(load_file(path))
    return net.eval()


@torch.no_grad()
def weights(net):
    found = []
    for block in net.layer3:
        norm = block.bn2
        weight = norm.weight
        if isinstance(norm, NormalizedBatchNorm2d):
            weight = net.scale_factor[0] * weight / (weight.norm() + NORM_EPSILON)
        found.append([round(v, 5) for v in weight.tolist()])
    return found


@torch.no_grad()
def strength(net, images, labels, classes):
    norms = []
    for batch in images.split(500):
        x = F.relu(net.bn1(net.conv1(batch)))
        norms.append(net.layer3(net.layer2(net.layer1(x))).mean((2, 3)).norm(dim=1))
    norms = torch.cat(norms).numpy()
    return [round(float(norms[labels == k].mean()), 5) for k in range(classes)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    folder = ROOT / "results" / args.name
    classes = len((args.data / "classes.txt").read_text().split("\n")) - 1
    images, labels = pictures(args.data / "test.bin", 2 if classes == 100 else 1)
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if (net := network(path, classes)) is None:
            print(path.stem, "is not finished: left out")
            continue
        found[path.stem] = {"weights": weights(net), "strength": strength(net, images, labels, classes)}
        print(path.stem)
    if not found:
        sys.exit(f"{folder} holds no finished checkpoint: results/run.py makes them")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in found.items())
    (folder / "distributions.json").write_text("{\n" + lines + "\n}\n")
    insert(f"inside {args.name}", table(args.name, found))


def table(name, found):
    """Spread of weights and of feature strength, mean over the seeds; and its correlation with the class's rank."""
    text = [f"{name}: standard deviation ÷ mean; mean over the seeds.", "", "| loss | network | weights | strength | strength and rank |", "|---|---|---|---|---|"]
    for loss in LOSSES:
        for variant in VARIANTS:
            runs = [run for key, run in found.items() if key.removeprefix(f"{stem(loss, variant)}-").isdigit()]
            if not runs:
                continue
            weights = np.mean([spread(np.abs(np.concatenate([np.array(block) for block in run["weights"]]))) for run in runs])
            strength = np.mean([spread(np.array(run["strength"])) for run in runs])
            rank = np.mean([np.corrcoef(run["strength"], np.arange(len(run["strength"])))[0, 1] for run in runs])
            text.append(f"| {loss} | {variant} | {weights:.3f} | {strength:.3f} | {rank:+.2f} |")
    return text


def spread(values):
    return values.std() / values.mean()


if __name__ == "__main__":
    main()
