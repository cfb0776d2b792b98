"""Compares no calibration, one temperature and `nbn fold calibrate` over random long-tailed calibration draws.

    nbn fold evaluate BUNDLE --data test.bin --logits test.safetensors
    python tests/oracle/calibration_draws.py BUNDLE test.safetensors [--draws 20] [--fold target/release/fold]

Needs numpy and safetensors. Every draw splits the balanced test images of each class in two halves. From the first half
it takes calibration images in the class mix of training (a tenth of the training images of each class, at least one), and
runs `nbn fold calibrate` on them. The second half, balanced, is what all figures are measured on, by `nbn fold evaluate` and, for
the two scorers that have no sets of their own, by split conformal prediction with the plain score on the same draw.
Prints mean ± standard deviation over the draws, and the mean of the paired differences from one temperature.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ALPHA = 0.1


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def plain_sets(calibration, evaluation, temperature):
    """Macro coverage and mean size of plain split conformal sets."""
    (z, y), (ze, ye) = calibration, evaluation
    scores = np.sort(-softmax(z / temperature)[np.arange(len(y)), y])
    rank = math.ceil((len(y) + 1) * (1 - ALPHA) - 1e-9)
    inside = -softmax(ze / temperature) <= scores[rank - 1]
    covered = inside[np.arange(len(ye)), ye]
    return np.mean([covered[ye == k].mean() for k in np.unique(ye)]), inside.sum(1).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--fraction", type=float, default=0.1, help="calibration images per training image")
    parser.add_argument("--fold", default="target/release/fold")
    args = parser.parse_args()
    counts = [c["count"] for c in json.loads((args.bundle / "manifest.json").read_text())["classes"]]
    # The manifest counts what was trained on: nine tenths of the set, when a tenth was held out.
    wanted = [max(1, round(args.fraction * n / (1 - args.fraction))) for n in counts]
    data = load_file(args.logits)
    z, y = data["logits"].astype(np.float64), data["labels"]
    table = {name: [] for name in ("softmax", "temperature", "calibrated")}
    rungs = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for draw in range(args.draws):
            random = np.random.default_rng(draw)
            chosen, rest = [], []
            for k, n in enumerate(wanted):
                rows = random.permutation(np.flatnonzero(y == k))
                half = len(rows) // 2
                chosen.append(rows[: min(n, half)])
                rest.append(rows[half:])
            sets = {"calibration": np.sort(np.concatenate(chosen)), "evaluation": np.sort(np.concatenate(rest))}
            for name, rows in sets.items():
                save_file({"logits": data["logits"][rows], "labels": y[rows]}, folder / f"{name}.safetensors")
            fitted = folder / "calibration.json"
            run = lambda *words: subprocess.run([args.fold, *map(str, words)], check=True, capture_output=True, text=True)
            run("calibrate", args.bundle, "--data", folder / "calibration.safetensors", "--out", fitted, "--force")
            run("evaluate", args.bundle, "--data", folder / "evaluation.safetensors", "--calibration", fitted,
                "--report", folder, "--alpha", ALPHA, "--resamples", 20)
            calibration = json.loads(fitted.read_text())
            rungs[calibration["rung"]] = rungs.get(calibration["rung"], 0) + 1
            uniform = json.loads((folder / "report.json").read_text())["evaluation"]["priors"][0]
            for scorer in uniform["scorers"]:
                slices = {s["slice"]: {k: v["value"] for k, v in s["metrics"].items()} for s in scorer["slices"]}
                fewest = slices.get("few", slices.get("medium"))
                macro = slices["macro"]
                row = {"top1": 100 * macro["top1"], "NLL": macro["nll"], "ECE %": 100 * macro["ece"],
                       "cw-ECE % rarest group": 100 * fewest["classwise_ece"]}
                if scorer["scorer"] == "calibrated":
                    coverage, size = macro["pas_coverage"], macro["pas_size"]
                else:
                    t = 1.0 if scorer["scorer"] == "softmax" else calibration["temperature_alone"]
                    c, e = sets["calibration"], sets["evaluation"]
                    coverage, size = plain_sets((z[c], y[c]), (z[e], y[e]), t)
                table[scorer["scorer"]].append(row | {"macro coverage %": 100 * coverage, "set size": size})
    sizes = f"{sum(wanted)} calibration images, {min(wanted)} to {max(wanted)} a class"
    print(f"{args.draws} draws, {sizes}; chosen: {rungs}\n")
    names = list(table["softmax"][0])
    print("| calibrator | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for scorer, rows in table.items():
        cells = [[r[n] for r in rows] for n in names]
        print(f"| {scorer} | " + " | ".join(f"{np.mean(c):.3f} ± {np.std(c, ddof=1):.3f}" for c in cells) + " |")
    differences = {n: np.array([a[n] - b[n] for a, b in zip(table["calibrated"], table["temperature"])]) for n in names}
    cells = [f"{d.mean():+.3f} ± {d.std(ddof=1):.3f}" for d in differences.values()]
    print("| calibrated − temperature | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
