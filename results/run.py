"""The paired runs: plain BatchNorm, +NBN, +LR, +NBN+LR, for two losses, on long-tailed CIFAR, and their tables in RESULTS.md.

    cargo build --release --features train --bin fold
    python3 results/run.py --data CIFAR10_FOLDER --name cifar10-lt --arch resnet8_w8 --epochs 10 --seeds 3

The folder holds train.bin, test.bin and classes.txt of CIFAR's binary version. Every run goes on where it stopped when the
script is started again. A run's last epoch is what counts, never its best. The raw lines stand in results/NAME/*.metrics.jsonl.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "BN": ["--norm", "bn", "--head", "linear"],
    "NBN": ["--norm", "nbn", "--head", "linear"],
    "BN + LR": ["--norm", "bn", "--head", "lr-plain"],
    "NBN + LR": ["--norm", "nbn", "--head", "lr-plain"],
}
# What else was tried of NBN, with cross-entropy and a linear head; a network of the width _w8 has 32 channels in its last stage.
ATTEMPTS = {
    "magnitude √32 at first": ["--magnitude-start", "5.657"],
    "magnitude √32, fixed": ["--magnitude-start", "5.657", "--magnitude-mode", "fixed"],
    "biases from zero": ["--bias-start", "zero"],
    "all norms of the last stage": ["--nbn-layers", "last-stage-all"],
    "all norms, a magnitude each": ["--nbn-layers", "all", "--magnitude", "layer"],
}
LOSSES = ["cross-entropy", "balanced-softmax"]
COLUMNS = ["overall", "many", "medium", "few"]


def stem(loss, variant):
    """What the files of a pair's runs begin with; a hyphen and the seed follow."""
    return f"{loss}-{variant.replace(' + ', '-').lower()}"


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
    parser.add_argument("--attempts", type=int, default=0, help="seeds for other ways of NBN, after the pairs")
    args = parser.parse_args()
    folder = ROOT / "results" / args.name
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"arch": args.arch, "epochs": args.epochs, "imbalance_factor": args.imbalance_factor}
    kept = folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        sys.exit(f"{kept} is of other runs: {kept.read_text().strip()}: give another --name, or remove the folder")
    kept.write_text(json.dumps(settings) + "\n")
    rows, attempts = {}, {}

    def run(name, seed, flags):
        """The last epoch's accuracies of a run, which is trained as far as it is not."""
        metrics = folder / f"{name}-{seed}.metrics.jsonl"
        if last(metrics)["epoch"] < args.epochs:
            subprocess.run(
                [args.fold, "train", "--data", args.data, "--imbalance-factor", args.imbalance_factor,
                 "--calibration-fraction", "0", "--arch", args.arch, "--epochs", str(args.epochs),
                 "--test-every", str(args.epochs), "--seed", str(seed), *flags,
                 "--threads", args.threads, "--out", str(folder / f"{name}-{seed}.safetensors"), "--resume"],
                check=True,
            )
            # Where the set lies on this machine says nothing.
            metrics.write_text(metrics.read_text().replace(str(Path(args.data).parent) + "/", ""))
        evaluation = last(metrics)["evaluation"]
        return {"overall": evaluation["overall"], **evaluation["groups"]}

    # Seed by seed, so that what is there after any stop is paired.
    for seed in range(args.seeds):
        for loss in LOSSES:
            for variant, flags in VARIANTS.items():
                rows.setdefault((loss, variant), []).append(run(stem(loss, variant), seed, ["--loss", loss, *flags]))
        write(folder, args, rows, attempts)
    for seed in range(args.attempts):
        for number, (attempt, flags) in enumerate(ATTEMPTS.items()):
            found = run(f"attempt-{number}", seed, ["--loss", "cross-entropy", *VARIANTS["NBN"], *flags])
            attempts.setdefault(attempt, []).append(found)
        write(folder, args, rows, attempts)


def cell(values, sign=""):
    """Mean ± standard deviation of shares, in percent."""
    if not values:
        return "–"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.1f}{spread}"


def write(folder, args, rows, attempts):
    """The tables, as a file and between the markers of RESULTS.md."""
    seeds = min(len(runs) for runs in rows.values())
    head = ["| loss | network | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    text = [
        f"{args.name}, imbalance factor {args.imbalance_factor}, {args.arch}, {args.epochs} epochs, {seeds} seeds; top-1 % of the last "
        "epoch on the balanced test set, mean ± standard deviation.",
        "",
        *head,
    ]
    for (loss, variant), runs in rows.items():
        cells = [cell([run[column] for run in runs if column in run]) for column in COLUMNS]
        text.append(f"| {loss} | {variant} | " + " | ".join(cells) + " |")
    text += ["", "What is added to BN, and what NBN adds to BN + LR, seed by seed, in points:", "", *head]
    for loss in LOSSES:
        for variant, base in [("NBN", "BN"), ("BN + LR", "BN"), ("NBN + LR", "BN"), ("NBN + LR", "BN + LR")]:
            pairs = list(zip(rows.get((loss, variant), []), rows.get((loss, base), [])))
            gains = [cell([run[c] - plain[c] for run, plain in pairs if c in run], "+") for c in COLUMNS]
            text.append(f"| {loss} | {variant} − {base.replace('BN + LR', '(BN + LR)')} | " + " | ".join(gains) + " |")
    if attempts:
        plain = rows["cross-entropy", "BN"]
        text += ["", "Other ways of NBN (cross-entropy, linear head), less BN, seed by seed, in points:", ""]
        text += ["| NBN | seeds | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
        for attempt, runs in attempts.items():
            gains = [cell([run[c] - base[c] for run, base in zip(runs, plain) if c in run], "+") for c in COLUMNS]
            text.append(f"| {attempt} | {len(runs)} | " + " | ".join(gains) + " |")
    (folder / "table.md").write_text("\n".join(text) + "\n")
    insert(args.name, text)


def insert(mark, lines):
    """Puts lines between the page's markers, `<!-- mark -->` and `<!-- end of mark -->`."""
    page = ROOT / "results/RESULTS.md"
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    if page.exists() and begin in (old := page.read_text()):
        page.write_text(old[: old.index(begin) + len(begin)] + "\n".join(lines) + "\n" + old[old.index(end) :])


if __name__ == "__main__":
    main()
