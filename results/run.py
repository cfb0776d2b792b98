"""The paired runs: plain BatchNorm, +NBN, +LR, +NBN+LR, for two losses, on long-tailed CIFAR; then RESULTS.md.

    cargo build --release --features train --bin fold
    python3 results/run.py --data CIFAR10_FOLDER --name cifar10-lt --arch resnet8_w8 --epochs 10 --seeds 3

The folder holds train.bin, test.bin and classes.txt of CIFAR's binary version. Every run goes on where it stopped when the
script is started again. A run's last epoch is what counts, never its best. The raw lines stand in results/NAME/*.metrics.jsonl.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "BN": ["--norm", "bn", "--head", "linear"],
    "NBN": ["--norm", "nbn", "--head", "linear"],
    "BN + LR": ["--norm", "bn", "--head", "lr-plain"],
    "NBN + LR": ["--norm", "nbn", "--head", "lr-plain"],
}
LOSSES = ["cross-entropy", "balanced-softmax"]
COLUMNS = ["overall", "many", "medium", "few"]


def last(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {"epoch": 0}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--fold", default=str(ROOT / "target/release/fold"))
    parser.add_argument("--arch", default="resnet8_w8")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--imbalance-factor", default="100")
    parser.add_argument("--threads", default="1")
    args = parser.parse_args()
    folder = ROOT / "results" / args.name
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    # Seed by seed, so that what is there after any stop is paired.
    for seed in range(args.seeds):
        for loss in LOSSES:
            for variant, flags in VARIANTS.items():
                name = f"{loss}-{variant.replace(' + ', '-').lower()}-{seed}"
                metrics = folder / f"{name}.metrics.jsonl"
                if last(metrics)["epoch"] < args.epochs:
                    subprocess.run(
                        [args.fold, "train", "--data", args.data, "--imbalance-factor", args.imbalance_factor,
                         "--calibration-fraction", "0", "--arch", args.arch, "--epochs", str(args.epochs),
                         "--test-every", str(args.epochs), "--seed", str(seed), "--loss", loss, *flags,
                         "--threads", args.threads, "--out", str(folder / f"{name}.safetensors"), "--resume"],
                        check=True,
                    )
                report = last(metrics)
                accuracy = {"overall": report["evaluation"]["overall"], **report["evaluation"]["groups"]}
                rows.setdefault((loss, variant), []).append((accuracy, report["seconds"]))
        write(folder, args, rows)


def write(folder, args, rows):
    seeds = min(len(runs) for runs in rows.values())
    text = [
        f"{args.name}, imbalance factor {args.imbalance_factor}, {args.arch}, {args.epochs} epochs, {seeds} seed(s); top-1 % of the "
        "last epoch on the balanced test set, mean ± standard deviation.",
        "",
        "| loss | network | " + " | ".join(COLUMNS) + " | minutes |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for (loss, variant), runs in rows.items():
        cells = []
        for column in COLUMNS:
            values = [100 * accuracy[column] for accuracy, _ in runs if column in accuracy]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        minutes = statistics.mean(seconds for _, seconds in runs) / 60
        text.append(f"| {loss} | {variant} | " + " | ".join(cells) + f" | {minutes:.1f} |")
    (folder / "table.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
