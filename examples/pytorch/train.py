"""Trains a CIFAR ResNet with NBN and an LR head on a long-tailed CIFAR-10 or CIFAR-100 in the public binary version.

    python train.py --data DIR --out run        # DIR holds train.bin, test.bin, classes.txt
    nbn fold export run/checkpoint.pth.tar --classes run/classes.csv --preprocessing cifar \\
        --evaluation run/evaluation.json --out models/cifar10-lt/1

Needs torch and numpy. Runs on a CPU; started again with the same arguments, it goes on where it stopped.
Of every class a stratified `--calibration-fraction` is held out of training (at least one image); its
record numbers in train.bin are written to run/calibration.json, those trained on to run/training.json: `nbn fold calibrate`
takes both.
"""

import argparse
import csv
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nbn import CifarResNet

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2023, 0.1994, 0.2010]).view(1, 3, 1, 1)
PIXELS = 3 * 32 * 32


def read(path, classes):
    """labels [N], images uint8 [N,3,32,32] of a CIFAR binary file; CIFAR-100's has a coarse label before the fine one."""
    label_bytes = 2 if classes == 100 else 1
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, label_bytes + PIXELS)
    return torch.from_numpy(records[:, label_bytes - 1].astype(np.int64)), torch.from_numpy(
        records[:, label_bytes:].reshape(-1, 3, 32, 32).copy()
    )


def long_tail(labels, classes, imbalance_factor, fraction, seed):
    """Record numbers for training and for calibration: the first n_k of each class, split at random."""
    largest = int((labels == 0).sum())
    generator = torch.Generator().manual_seed(seed)
    training, held_out = [], []
    for k in range(classes):
        count = int(largest * imbalance_factor ** (-k / (classes - 1)))
        of_class = torch.nonzero(labels == k)[:, 0]
        if len(of_class) < count:
            raise SystemExit(f"class {k} has {len(of_class)} images; imbalance factor {imbalance_factor:g} needs {count}")
        order = of_class[:count][torch.randperm(count, generator=generator)]
        kept = max(1, round(count * fraction)) if fraction > 0 else 0
        held_out.append(order[:kept])
        training.append(order[kept:])
    return torch.cat(training), torch.cat(held_out)


def augment(images, generator):
    """Random crop with a padding of 4 and random horizontal flip. images: float [B,3,32,32]."""
    batch = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    top = torch.randint(0, 9, (batch, 1), generator=generator) + torch.arange(32)
    left = torch.randint(0, 9, (batch, 1), generator=generator) + torch.arange(32)
    flip = torch.rand(batch, generator=generator) < 0.5
    left = torch.where(flip[:, None], left.flip(1), left)
    b = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[b, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def evaluate(model, images, labels, counts):
    model.eval()
    hits = torch.cat([
        (model((x.float() / 255 - MEAN) / STD).argmax(1) == y)
        for x, y in zip(images.split(500), labels.split(500))
    ]).float()
    recall = torch.stack([hits[labels == k].mean() for k in range(len(counts))])
    counts = torch.tensor(counts)
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    result = {"overall": hits.mean().item()}
    result.update({g: recall[m].mean().item() for g, m in groups.items() if m.any()})
    result["recall"] = [round(r, 4) for r in recall.tolist()]
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--norm", choices=["nbn", "bn"], default="nbn")
    parser.add_argument("--head", choices=["linear", "lr", "lr-plain"], default="linear")
    parser.add_argument("--option", choices=["A", "B"], default="A", help="shortcut")
    parser.add_argument("--imbalance-factor", type=float, default=100)
    parser.add_argument("--calibration-fraction", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    names = (args.data / "classes.txt").read_text().split()
    labels, images = read(args.data / "train.bin", len(names))
    test_labels, test_images = read(args.data / "test.bin", len(names))
    training, held_out = long_tail(labels, len(names), args.imbalance_factor, args.calibration_fraction, args.seed)
    counts = torch.bincount(labels[training], minlength=len(names)).tolist()
    with open(args.out / "classes.csv", "w", newline="") as f:
        csv.writer(f).writerows([["label", "count"], *zip(names, counts)])
    for name, records in (("calibration", held_out), ("training", training)):
        text = json.dumps({"file": "train.bin", "records": sorted(records.tolist())})
        (args.out / f"{name}.json").write_text(text)

    model = CifarResNet(args.depth, len(names), args.norm, args.head, args.option)
    no_decay = {"scale_factor"} | {
        f"{n}.{p}" for n, m in model.named_modules() if type(m).__name__ == "NormalizedBatchNorm2d" for p in ("weight", "bias")
    }
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD(
        [{"params": [p for n, p in named if n not in no_decay], "weight_decay": args.weight_decay},
         {"params": [p for n, p in named if n in no_decay], "weight_decay": 0.0}],
        lr=args.lr, momentum=0.9, nesterov=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda e: min(1.0, (e + 1) / 5) if e < 5 else 0.5 * (1 + math.cos(math.pi * (e - 5) / max(1, args.epochs - 5))),
    )
    path, start = args.out / "checkpoint.pth.tar", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        start = saved["epoch"]

    for epoch in range(start, args.epochs):
        began, total = time.time(), 0.0
        generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
        model.train()
        order = training[torch.randperm(len(training), generator=generator)]
        for batch in order.split(args.batch):
            x = augment((images[batch].float() / 255 - MEAN) / STD, generator)
            loss = F.cross_entropy(model(x), labels[batch])
            if not torch.isfinite(loss):
                raise SystemExit(f"epoch {epoch + 1}: the loss is {loss.item()}; try a smaller --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        scheduler.step()
        last = epoch + 1 == args.epochs
        result = evaluate(model, test_images, test_labels, counts) if last or (epoch + 1) % 10 == 0 else {}
        temporary = path.with_suffix(".tmp")
        torch.save({
            "epoch": epoch + 1, "arch": f"resnet{args.depth}_{args.norm}", "state_dict": model.state_dict(),
            "best_acc1": result.get("overall", 0.0) * 100, "optimizer": optimizer.state_dict(),
            "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"} | {"lr_lambdas": [None, None]},
        }, temporary)
        temporary.replace(path)
        print(f"epoch {epoch + 1}/{args.epochs}  loss {total / len(order):.4f}  {time.time() - began:.0f} s  {result}", flush=True)
        if last:
            accuracy = {k: round(v, 4) for k, v in result.items() if k != "recall"}
            (args.out / "evaluation.json").write_text(json.dumps({
                "metric": "top-1 accuracy; many/medium/few: mean recall of the group's classes",
                "data": f"test.bin, {len(test_labels)} balanced images never trained on",
                "how": f"last of {args.epochs} epochs, seed {args.seed}, PyTorch {torch.__version__}",
                **accuracy, "recall": dict(zip(names, result["recall"])),
            }, indent=2) + "\n")


if __name__ == "__main__":
    main()
