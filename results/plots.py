"""Draws results/NAME/accuracy.svg and results/NAME/distributions.svg from the metrics and distributions.json there.

    python3 results/plots.py --name cifar10-lt

Needs matplotlib.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

from run import COLUMNS, LOSSES, ROOT, VARIANTS, last, stem  # noqa: E402

COLOURS = {"BN": "#7f7f7f", "NBN": "#1f77b4", "BN + LR": "#e0a030", "NBN + LR": "#c0392b"}
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nbn", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def runs(folder, loss, variant):
    """The last lines of every seed's metrics."""
    found = []
    while (path := folder / f"{stem(loss, variant)}-{len(found)}.metrics.jsonl").exists():
        report = last(path)
        if "evaluation" not in report:
            break
        found.append({"overall": report["evaluation"]["overall"], **report["evaluation"]["groups"]})
    return found


def accuracy(folder, name):
    figure, axes = plt.subplots(1, len(LOSSES), figsize=(9, 3), sharey=True)
    for loss, axis in zip(LOSSES, axes):
        for n, variant in enumerate(VARIANTS):
            for at, column in enumerate(COLUMNS):
                values = [100 * run[column] for run in runs(folder, loss, variant) if column in run]
                x = at + 0.16 * (n - 1.5)
                axis.plot([x] * len(values), values, ".", color=COLOURS[variant], alpha=0.6, ms=5)
                if values:
                    label = variant if at == 0 else None
                    axis.plot([x - 0.07, x + 0.07], [statistics.mean(values)] * 2, color=COLOURS[variant], lw=2.5, label=label)
        axis.set_xticks(range(len(COLUMNS)), COLUMNS)
        axis.set_title(loss)
    axes[0].set_ylabel("top-1 %")
    axes[0].legend(frameon=False, ncols=2)
    figure.suptitle(f"{name}: a dot is a seed, a line their mean")
    save(figure, folder / "accuracy.svg")


def distributions(folder, name):
    found = json.loads((folder / "distributions.json").read_text())
    figure, axes = plt.subplots(len(LOSSES), 2, figsize=(9, 5.4))
    for loss, (weights, strength) in zip(LOSSES, axes):
        for variant in VARIANTS:
            seeds = [run for seed in range(20) if (run := found.get(f"{stem(loss, variant)}-{seed}"))]
            for n, run in enumerate(seeds):
                values = sorted((abs(v) for block in run["weights"] for v in block), reverse=True)
                mean = statistics.mean(values)
                weights.plot([v / mean for v in values], color=COLOURS[variant], lw=1, label=variant if n == 0 else None)
            if seeds:
                means = [statistics.mean(classes) for classes in zip(*(run["strength"] for run in seeds))]
                middle = statistics.mean(means)
                strength.plot([v / middle for v in means], color=COLOURS[variant], lw=1.2, label=variant)
        weights.set_ylabel(f"{loss}\n|weight| ÷ mean")
        strength.set_ylabel("feature norm ÷ mean")
    axes[0][0].set_title("effective weights of the last norms, sorted")
    axes[0][1].set_title("feature strength by class, most frequent first")
    axes[-1][0].set_xlabel("rank")
    axes[-1][1].set_xlabel("class")
    axes[0][0].legend(frameon=False)
    figure.suptitle(name)
    save(figure, folder / "distributions.svg")


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    folder = ROOT / "results" / args.name
    accuracy(folder, args.name)
    if (folder / "distributions.json").exists():
        distributions(folder, args.name)


if __name__ == "__main__":
    main()
