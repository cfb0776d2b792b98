"""Compares no calibration, one temperature and `nbn fold calibrate` over random long-tailed calibration draws.

    nbn fold evaluate BUNDLE --data test.bin --logits test.safetensors
    python tests/oracle/calibration_draws.py BUNDLE test.safetensors [--draws 20] [--fold target/release/fold]
        [--earlier PATH/TO/AN/EARLIER/fold]

Needs numpy and safetensors. Every draw splits the balanced test images of each class in two halves. From the first half
it takes calibration images in the class mix of training (a tenth of the training images of each class, at least one), and
runs `nbn fold calibrate` on them. The second half, balanced, is what all figures are measured on, by `nbn fold evaluate` and, for
the two scorers that have no sets of their own, by split conformal prediction with the plain score on the same draw.
Prints, under each prior, mean ± standard deviation over the draws, and the mean of the paired differences with its 95 %
interval.
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
    parser.add_argument("--earlier", help="a fold of an earlier release, to compare with")
    args = parser.parse_args()
    counts = [c["count"] for c in json.loads((args.bundle / "manifest.json").read_text())["classes"]]
    # The manifest counts what was trained on: nine tenths of the set, when a tenth was held out.
    wanted = [max(1, round(args.fraction * n / (1 - args.fraction))) for n in counts]
    data = load_file(args.logits)
    z, y = data["logits"].astype(np.float64), data["labels"]
    tables, rungs = {}, {}
    programs = {"calibrated": args.fold} | ({"earlier": args.earlier} if args.earlier else {})
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
            for name, program in programs.items():
                calibration, priors = of_draw(program, args.bundle, folder)
                if name == "calibrated":
                    rungs[calibration["rung"]] = rungs.get(calibration["rung"], 0) + 1
                for prior in priors:
                    for scorer in prior["scorers"]:
                        if name == "earlier" and scorer["scorer"] != "calibrated":
                            continue
                        row = figures(scorer)
                        if scorer["scorer"] != "calibrated" and prior["prior"] == "uniform":
                            t = 1.0 if scorer["scorer"] == "softmax" else calibration["temperature_alone"]
                            c, e = sets["calibration"], sets["evaluation"]
                            coverage, size = plain_sets((z[c], y[c]), (z[e], y[e]), t)
                            row |= {"macro coverage %": 100 * coverage, "set size": size}
                        key = name if scorer["scorer"] == "calibrated" else scorer["scorer"]
                        tables.setdefault(prior["prior"], {}).setdefault(key, []).append(row)
    sizes = f"{sum(wanted)} calibration images, {min(wanted)} to {max(wanted)} a class"
    print(f"{args.draws} draws, {sizes}; chosen: {rungs}")
    for prior, table in tables.items():
        show(prior, table)


def of_draw(program, bundle, folder):
    """The calibration that `program` fits to the draw, and its figures under each prior."""
    def run(*words):
        subprocess.run([program, *map(str, words)], check=True, capture_output=True, text=True)

    fitted = folder / "calibration.json"
    run("calibrate", bundle, "--data", folder / "calibration.safetensors", "--out", fitted, "--force")
    run("evaluate", bundle, "--data", folder / "evaluation.safetensors", "--calibration", fitted,
        "--report", folder, "--alpha", ALPHA, "--resamples", 20)
    return json.loads(fitted.read_text()), json.loads((folder / "report.json").read_text())["evaluation"]["priors"]


def figures(scorer):
    """Of the whole mix, and the classwise error and the coverage of each group."""
    slices = {s["slice"]: {k: v["value"] for k, v in s["metrics"].items()} for s in scorer["slices"]}
    whole = slices["overall"]
    row = {"top1": 100 * whole["top1"], "NLL": whole["nll"], "ECE %": 100 * whole["ece"],
           "cw-ECE %": 100 * whole["classwise_ece"]}
    groups = [name for name in ("many", "medium", "few") if name in slices]
    row |= {f"cw-ECE % {name}": 100 * slices[name]["classwise_ece"] for name in groups}
    if "pas_coverage" in whole:
        # What `alpha` alone asks for.
        sets = "posterior" if "posterior_coverage" in whole else "pas"
        row |= {"macro coverage %": 100 * slices["macro"][f"{sets}_coverage"], "set size": whole[f"{sets}_size"]}
        row |= {f"coverage % {name}": 100 * slices[name][f"{sets}_coverage"] for name in groups}
        row |= {"size of pas": whole["pas_size"]}
    return row


def show(prior, table):
    names = list(max(table.values(), key=lambda rows: len(rows[0]))[0])
    print(f"\nunder the {prior} prior\n\n| calibrator | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    order = [name for name in ("softmax", "temperature", "earlier", "calibrated") if name in table]
    for scorer in order:
        cells = [[r[n] for r in table[scorer] if n in r] for n in names]
        cells = [f"{np.mean(c):.3f} ± {np.std(c, ddof=1):.3f}" if c else "–" for c in cells]
        print(f"| {scorer} | " + " | ".join(cells) + " |")
    for other in order[:-1]:
        pairs = [[a[n] - b[n] for a, b in zip(table["calibrated"], table[other]) if n in a and n in b] for n in names]
        cells = [f"{np.mean(d):+.3f} ± {1.96 * np.std(d, ddof=1) / math.sqrt(len(d)):.3f}" if d else "–" for d in pairs]
        print(f"| calibrated − {other} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
