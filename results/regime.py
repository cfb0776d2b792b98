"""The test of NBN in its own regime: what PLAN.md plans, run, and its tables and curves in RESULTS.md.

    cargo build --release --features train --bin fold
    python3 results/regime.py --data CIFAR100_FOLDER             # trains what is not trained yet, then writes
    python3 results/regime.py --only BN NBN --seeds 0            # of the arms named, these seeds
    python3 results/regime.py --write                            # tables and curves of what is there

The folder holds train.bin, test.bin and classes.txt of CIFAR-100's binary version. A run is a `fold train` of its own, as many
at once as --at-once says, and goes on where it stopped. What is kept of it stands in results/regime:
NAME-SEED.metrics.jsonl, a line per epoch, and NAME-SEED.answers, the class that the last network gives each test image, in base64;
their true classes are in `labels`.
Needs numpy, safetensors and matplotlib.
"""

import argparse
import base64
import json
import math
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from safetensors.numpy import load_file

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

from run import ROOT, insert, last  # noqa: E402

FOLDER = ROOT / "results/regime"
RECIPE = [
    "--imbalance-factor", "100", "--calibration-fraction", "0", "--arch", "resnet20_w8", "--shortcut", "b", "--batch", "64",
    "--epochs", "120", "--lr", "0.1", "--warm-up", "5", "--schedule", "step", "--milestones", "96,96,108", "--decay-factor", "0.1",
    "--weight-decay", "2e-4", "--loss", "cross-entropy", "--augment", "crop,flip", "--test-every", "10",
]
EPOCHS, FALLS, CHANNELS, CLASSES = 120, 96, 32, 100
BN, NBN = ["--norm", "bn"], ["--norm", "nbn", "--bias-start", "zero"]
LINEAR, LR, ALL = ["--head", "linear"], ["--head", "lr-plain"], ["--decay", "all"]
ARMS = {
    "BN": [*BN, *LINEAR, *ALL],
    "NBN": [*NBN, *LINEAR, *ALL],
    "BN + LR": [*BN, *LR, *ALL],
    "NBN + LR": [*NBN, *LR, *ALL],
}
# One change at a time to NBN, in the order that PLAN.md gives.
TRIES = {
    "NBN, biases from random": ["--norm", "nbn", "--bias-start", "normal", *LINEAR, *ALL],
    "NBN, α from √C": [*ARMS["NBN"], "--magnitude-start", "5.657"],
    "NBN, tenfold rate on α": [*ARMS["NBN"], "--magnitude-lr", "10"],
    "NBN, no decay on α": [*NBN, *LINEAR, "--decay", "directions"],
}
PAIRS = [("NBN", "BN"), ("BN + LR", "BN"), ("NBN + LR", "BN + LR"), ("NBN + LR", "BN")]
GROUPS = {"overall": (0, 10**9), "many": (101, 10**9), "medium": (20, 100), "few": (0, 19)}
# The 97.5 % point of Student's t by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def stem(arm):
    """What the files of an arm's runs begin with; a hyphen and the seed follow."""
    for long, short in {" + ": "-", "biases from random": "random-biases", "α from √C": "from-sqrt-c", "tenfold rate on α": "tenfold", "no decay on α": "no-decay", ", ": "-"}.items():
        arm = arm.replace(long, short)
    return arm.lower()


def lines(arm, seed):
    path = FOLDER / f"{stem(arm)}-{seed}.metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(args, arm, seed):
    """Trains a run as far as it is not, and keeps what its network answers."""
    base = FOLDER / f"{stem(arm)}-{seed}"
    metrics, answers = base.with_suffix(".metrics.jsonl"), base.with_suffix(".answers")
    if answers.exists() and last(metrics)["epoch"] == EPOCHS:
        return
    out, test = base.with_suffix(".safetensors"), args.data / "test.bin"
    print(f"{base.name}: from epoch {last(metrics)['epoch']}", flush=True)
    with base.with_suffix(".log").open("w") as log:
        run = lambda *command: subprocess.run([args.fold, *command], check=True, stdout=log, stderr=log)  # noqa: E731
        run("train", "--data", args.data, *RECIPE, *(ARMS | TRIES)[arm], "--seed", str(seed), "--threads", args.threads, "--out", out, "--resume")
        with tempfile.TemporaryDirectory() as folder:
            bundle, logits = Path(folder) / "bundle/1", Path(folder) / "logits.safetensors"
            run("export", out, "--out", bundle, "--classes", args.data / "classes.txt")
            run("evaluate", bundle, "--data", test, "--logits", logits, "--resamples", "20")
            found = load_file(logits)
            for path, classes in [(FOLDER / "labels", found["labels"]), (answers, found["logits"].argmax(1))]:
                path.write_text(base64.b64encode(classes.astype("uint8").tobytes()).decode() + "\n")
    # Where the set lies on this machine says nothing.
    metrics.write_text(metrics.read_text().replace(f"{args.data}/", ""))
    print(f"{base.name}: {100 * last(metrics)['evaluation']['overall']:.2f} %", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--fold", default=str(ROOT / "target/release/fold"))
    parser.add_argument("--at-once", type=int, default=2, help="runs beside each other")
    parser.add_argument("--threads", default="1", help="of each")
    parser.add_argument("--only", nargs="+", choices=[*ARMS, *TRIES], default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="train nothing")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not args.write:
        if args.data is None:
            sys.exit("--data: give the folder of CIFAR-100's binary version")
        # Seed by seed, so that what is there after any stop is paired.
        with ThreadPoolExecutor(args.at_once) as pool:
            runs = [pool.submit(train, args, arm, seed) for seed in args.seeds for arm in args.only]
        for run in runs:
            run.result()
    write()


def lowest_ratio(run):
    """The lowest α/√C from the fall of the learning rate on; nothing without NBN."""
    ratios = [line["magnitudes"][0] / math.sqrt(CHANNELS) for line in run if line["magnitudes"] and line["epoch"] >= FALLS]
    return min(ratios) if ratios else None


def finished():
    """The runs that are done: {arm: {seed: lines}}."""
    found = {}
    for arm in [*ARMS, *TRIES]:
        for seed in range(10):
            run = lines(arm, seed)
            if run and run[-1]["epoch"] == EPOCHS and (FOLDER / f"{stem(arm)}-{seed}.answers").exists():
                found.setdefault(arm, {})[seed] = run
    return found


def write():
    runs = finished()
    insert("regime runs", table_of_runs(runs))
    insert("regime differences", table_of_differences(runs))
    insert("regime strength", table_of_strength(runs))
    curves(runs)


def table_of_runs(runs):
    text = [
        "| network | seed | last epoch | many | medium | few | best | in epoch | α/√C in the end | lowest from epoch 96 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, seeds in runs.items():
        for seed, run in seeds.items():
            evaluated = [line for line in run if "evaluation" in line]
            best = max(evaluated, key=lambda line: line["evaluation"]["overall"])
            end = run[-1]["evaluation"]
            cells = [f"{100 * v:.2f}" for v in (end["overall"], *(end["groups"][g] for g in ("many", "medium", "few")))]
            cells += [f"{100 * best['evaluation']['overall']:.2f}", str(best["epoch"])]
            low = lowest_ratio(run)
            cells += ["–", "–"] if low is None else [f"{run[-1]['magnitudes'][0] / math.sqrt(CHANNELS):.2f}", f"{low:.2f}"]
            text.append(f"| {arm} | {seed} | " + " | ".join(cells) + " |")
    return text


def right(arm, seed):
    """Whether each test image is answered rightly, and the images' classes."""
    of = lambda name: np.frombuffer(base64.b64decode((FOLDER / name).read_text()), np.uint8)  # noqa: E731
    return of(f"{stem(arm)}-{seed}.answers") == of("labels"), of("labels")


def table_of_differences(runs):
    counts = np.array([int(500 * 0.01 ** (k / (CLASSES - 1))) for k in range(CLASSES)])
    text = [
        "| | seeds | | overall | many | medium | few |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, base in [*PAIRS, *((arm, "BN") for arm in TRIES), *((arm, "NBN") for arm in TRIES)]:
        seeds = sorted(set(runs.get(arm, {})) & set(runs.get(base, {})))
        if not seeds:
            continue
        pairs = []
        for seed in seeds:
            (ours, labels), (theirs, _) = right(arm, seed), right(base, seed)
            pairs.append(ours.astype(float) - theirs)
        cells, images = [], []
        for limits in GROUPS.values():
            chosen = ((counts >= limits[0]) & (counts <= limits[1]))[labels]
            of_seeds = [100 * pair[chosen].mean() for pair in pairs]
            mean = np.mean(of_seeds)
            half = T[len(seeds) - 1] * np.std(of_seeds, ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
            cells.append(f"{mean:+.2f}" + (f" [{mean - half:+.2f}, {mean + half:+.2f}]" if half is not None else ""))
            of_images = 100 * np.mean(pairs, axis=0)[chosen]
            random = np.random.default_rng(0)
            means = [of_images[random.integers(0, len(of_images), len(of_images))].mean() for _ in range(2000)]
            low, high = np.percentile(means, [2.5, 97.5])
            images.append(f"[{low:+.2f}, {high:+.2f}]")
        name = f"{arm} − " + (f"({base})" if "+" in base else base)
        text.append(f"| {name} | {len(seeds)} | over seeds | " + " | ".join(cells) + " |")
        text.append("| | | over images | " + " | ".join(images) + " |")
    return text


def table_of_strength(runs):
    text = ["| network | seeds | many | medium | few | few ÷ many | ‖γ‖ | ‖β‖ | α |", "|---|---|---|---|---|---|---|---|---|"]
    for arm, seeds in runs.items():
        ends = [run[-1] for run in seeds.values()]
        strength = {g: statistics.mean([end["evaluation"]["feature_strength"][g] for end in ends]) for g in ("many", "medium", "few")}
        norms = [norm for end in ends for norm in end["norms"] if norm["name"].endswith(("bn2", "downsample.1"))]
        cells = [f"{v:.2f}" for v in strength.values()] + [f"{strength['few'] / strength['many']:.3f}"]
        cells += [f"{statistics.mean([norm['gamma'] for norm in norms]):.2f}", f"{statistics.mean([norm['beta'] for norm in norms]):.1f}"]
        alphas = [end["magnitudes"][0] for end in ends if end["magnitudes"]]
        cells.append(f"{statistics.mean(alphas):.2f}" if alphas else "–")
        text.append(f"| {arm} | {len(seeds)} | " + " | ".join(cells) + " |")
    return text


def curves(runs):
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nbn", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, rightmost) = plt.subplots(1, 3, figsize=(12, 3.4))
    for n, (arm, seeds) in enumerate(runs.items()):
        for at, run in enumerate(seeds.values()):
            style = {"color": f"C{n}", "lw": 1.2, "label": arm if at == 0 else None}
            if run[-1]["magnitudes"]:
                left.plot([line["epoch"] for line in run], [line["magnitudes"][0] / math.sqrt(CHANNELS) for line in run], **style)
            tested = [line for line in run if "evaluation" in line]
            epochs = [line["epoch"] for line in tested]
            middle.plot(epochs, [100 * line["evaluation"]["overall"] for line in tested], **style)
            strengths = [line["evaluation"]["feature_strength"] for line in tested]
            rightmost.plot(epochs, [s["few"] / s["many"] for s in strengths], **style)
    left.axhline(1, color="black", lw=0.8, ls=":")
    for axis, title in [(left, "α/√C"), (middle, "top-1 %, balanced"), (rightmost, "strength of features, few ÷ many")]:
        axis.set_title(title)
        axis.set_xlabel("epoch")
    middle.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER / "curves.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
