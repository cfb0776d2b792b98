"""The test of NBN in its own regime: what PLAN.md plans, run, and its tables and curves in RESULTS.md.

    cargo build --release --features train --bin fold
    python3 results/regime.py --data CIFAR100_FOLDER             # trains what is not trained yet, then writes
    python3 results/regime.py --only BN NBN --seeds 0            # of the arms named, these seeds
    python3 results/regime.py --of tries --seeds 0               # what was tried beside: tries, balanced, defaults
    python3 results/regime.py --write                            # tables and curves of what is there

The folder holds train.bin, test.bin and classes.txt of CIFAR-100's binary version. A run is a `fold train` of its own, as many
at once as --at-once says, and goes on where it stopped. What is kept of it stands in results/regime:
NAME-SEED.metrics.jsonl, a line per epoch, and NAME-SEED.answers, the class that the last network gives each test image, in
base64, in three ways (`READOUTS`), with the strengths of the last. The classes that are right are in `labels`.
Needs numpy, safetensors and matplotlib.
"""

import argparse
import base64
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from safetensors.numpy import load_file

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

from run import ROOT, insert, last  # noqa: E402

FOLDER = ROOT / "results/regime"
SET = [
    "--imbalance-factor", "100", "--calibration-fraction", "0", "--arch", "resnet20_w8", "--batch", "64", "--augment", "crop,flip",
    "--test-every", "10",
]
LONG = [
    "--shortcut", "b", "--epochs", "120", "--lr", "0.1", "--warm-up", "5", "--schedule", "step", "--milestones", "96,96,108",
    "--decay-factor", "0.1", "--weight-decay", "2e-4",
]
FALLS, CHANNELS, CLASSES = 96, 32, 100
# Training images of each class.
COUNTS = np.array([int(500 * 0.01 ** (k / (CLASSES - 1))) for k in range(CLASSES)])


@dataclass(frozen=True)
class Arm:
    """A way to train. Its files begin with `file`; a hyphen and the seed follow."""

    file: str
    flags: list
    epochs: int = 120
    loss: str = "cross-entropy"


BN, ZERO, RANDOM = ["--norm", "bn"], ["--norm", "nbn", "--bias-start", "zero"], ["--norm", "nbn", "--bias-start", "normal"]
LINEAR, LR, LR_AFFINE = ["--head", "linear"], ["--head", "lr-plain"], ["--head", "lr"]
ALL = [*LONG, "--decay", "all"]
QUICK = ["--recipe", "quick"]
ARMS = {
    "BN": Arm("bn", [*BN, *LINEAR, *ALL]),
    "NBN": Arm("nbn", [*ZERO, *LINEAR, *ALL]),
    "BN + LR": Arm("bn-lr", [*BN, *LR, *ALL]),
    "NBN + LR": Arm("nbn-lr", [*ZERO, *LR, *ALL]),
}
# One change at a time to NBN, in the order that PLAN.md gives.
TRIES = {
    "NBN, biases from random": Arm("nbn-random-biases", [*RANDOM, *LINEAR, *ALL]),
    "NBN + LR, biases from random": Arm("nbn-lr-random-biases", [*RANDOM, *LR, *ALL]),
    "BN + LR, weight and bias": Arm("bn-lr-affine", [*BN, *LR_AFFINE, *ALL]),
    "NBN, α from √C": Arm("nbn-from-sqrt-c", [*ZERO, *LINEAR, *ALL, "--magnitude-start", "5.657"]),
    "NBN, tenfold rate on α": Arm("nbn-tenfold", [*ZERO, *LINEAR, *ALL, "--magnitude-lr", "10"]),
    "NBN, no decay on α": Arm("nbn-no-decay", [*ZERO, *LINEAR, *LONG, "--decay", "directions"]),
}
BALANCED = {
    "BN, Balanced Softmax": Arm("balanced-bn", [*BN, *LINEAR, *ALL], loss="balanced-softmax"),
    "NBN, biases from random, Balanced Softmax": Arm("balanced-nbn-random-biases", [*RANDOM, *LINEAR, *ALL], loss="balanced-softmax"),
    "BN + LR, Balanced Softmax": Arm("balanced-bn-lr", [*BN, *LR, *ALL], loss="balanced-softmax"),
}
# What `fold train` does by itself, and with another norm, classifier or loss.
DEFAULTS = {
    f"{name}, {title}": Arm(f"quick-{file}-{loss}", [*QUICK, *flags], 60, loss)
    for title, loss in [("cross-entropy", "cross-entropy"), ("Balanced Softmax", "balanced-softmax")]
    for name, file, flags in [
        ("BN", "bn", [*BN, *LINEAR]),
        ("NBN", "nbn", [*RANDOM, *LINEAR]),
        ("NBN + LR", "nbn-lr", [*RANDOM, *LR]),
    ]
}
EVERY = {"plan": ARMS, "tries": TRIES, "balanced": BALANCED, "defaults": DEFAULTS}
PAIRS = [
    ("NBN, biases from random", "BN"),
    ("NBN", "BN"),
    ("BN + LR", "BN"),
    ("NBN + LR", "BN + LR"),
    ("NBN + LR, biases from random", "BN + LR"),
    ("NBN + LR", "BN"),
    ("BN + LR, weight and bias", "BN"),
    ("NBN, biases from random", "NBN"),
    ("NBN, biases from random, Balanced Softmax", "BN, Balanced Softmax"),
    ("BN + LR, Balanced Softmax", "BN, Balanced Softmax"),
    ("BN, Balanced Softmax", "BN"),
]
DEFAULT_PAIRS = [
    ("NBN, cross-entropy", "BN, cross-entropy"),
    ("NBN, Balanced Softmax", "BN, Balanced Softmax"),
    ("NBN + LR, cross-entropy", "NBN, cross-entropy"),
    ("NBN + LR, Balanced Softmax", "NBN, Balanced Softmax"),
    ("BN, Balanced Softmax", "BN, cross-entropy"),
    ("NBN, Balanced Softmax", "NBN, cross-entropy"),
    ("NBN, Balanced Softmax", "BN, cross-entropy"),
]
# Of the trainer's version that made these runs, seed 2 has the batches and crops of seed 0, its epochs in another order, as
# seed 1 has; seeds that differ by 128 or more have their own.
SEEDS = [0, 1, 128]
GROUPS = {"overall": (0, 10**9), "many": (101, 10**9), "medium": (20, 100), "few": (0, 19)}
# The 97.5 % point of Student's t for three seeds, that is, two degrees of freedom.
T = 4.303
# Answers by the logits; without the training set's prior where the loss has left it in, as the formula says; and with the
# strength of that fitted. The last is what is compared beside the first.
LOGITS, FIXED, FITTED = READOUTS = range(3)


def lines(arm, seed):
    path = FOLDER / f"{arm.file}-{seed}.metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def answers(arm, seed):
    """What is kept of a run's answers, or nothing: the three ways of `READOUTS`, and the strengths of the last."""
    kept = FOLDER / f"{arm.file}-{seed}.answers"
    kept = kept.read_text().splitlines() if kept.exists() else []
    return kept if len(kept) == len(READOUTS) + 1 else None


def train(args, arm, seed):
    """Trains a run as far as it is not, and keeps what its network answers."""
    base = FOLDER / f"{arm.file}-{seed}"
    metrics = base.with_suffix(".metrics.jsonl")
    if last(metrics)["epoch"] == arm.epochs and answers(arm, seed):
        return
    out, test = base.with_suffix(".safetensors"), args.data / "test.bin"
    print(f"{base.name}: from epoch {last(metrics)['epoch']}", flush=True)
    with base.with_suffix(".log").open("a") as log:
        run = lambda *command: subprocess.run([args.fold, *command], check=True, stdout=log, stderr=log)  # noqa: E731
        loss = ["--loss", arm.loss, "--seed", str(seed), "--threads", args.threads]
        run("train", "--data", args.data, *SET, *arm.flags, *loss, "--out", out, "--resume")
        with tempfile.TemporaryDirectory() as folder:
            bundle, file = Path(folder) / "bundle/1", Path(folder) / "logits.safetensors"
            run("export", out, "--out", bundle, "--classes", args.data / "classes.txt")
            run("evaluate", bundle, "--data", test, "--logits", file, "--resamples", "20")
            found = load_file(file)
    logits, labels = found["logits"], found["labels"]
    evaluation = last(metrics)["evaluation"]
    if abs((logits.argmax(1) == labels).mean() - evaluation["overall"]) > 1e-3:
        sys.exit(f"{out} is not the network of the last line of {metrics}: remove both, and train it again")
    fixed = (logits - (arm.loss == "cross-entropy") * np.log(COUNTS)).argmax(1)
    fitted, strengths = without_prior(logits, labels)
    coded = lambda classes: base64.b64encode(classes.astype("uint8").tobytes()).decode()  # noqa: E731
    (FOLDER / "labels").write_text(coded(labels) + "\n")
    kept = [*map(coded, (logits.argmax(1), fixed, fitted)), " ".join(f"{tau:.2f}" for tau in strengths)]
    base.with_suffix(".answers").write_text("\n".join(kept) + "\n")
    # Where the set lies on this machine says nothing.
    metrics.write_text(metrics.read_text().replace(f"{args.data}/", ""))
    print(f"{base.name}: {100 * evaluation['overall']:.2f} %", flush=True)


def without_prior(logits, labels):
    """The likeliest classes where all are equally frequent: logits − τ·log(training images), after training (Menon and others,
    arXiv 2007.07314). Each half of the images takes the τ that serves the other half best, since not every head's logits have
    the scale of a log-probability. Returns the classes, and both τ."""
    strengths = np.linspace(-1, 4, 101)
    by_strength = np.array([(logits - tau * np.log(COUNTS)).argmax(1) for tau in strengths])
    classes, taken, half = np.empty(len(labels), int), [], np.arange(len(labels)) % 2
    for here in (0, 1):
        best = (by_strength == labels)[:, half != here].mean(1).argmax()
        classes[half == here] = by_strength[best][half == here]
        taken.append(strengths[best])
    return classes, taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--fold", default=str(ROOT / "target/release/fold"))
    parser.add_argument("--at-once", type=int, default=2, help="runs beside each other")
    parser.add_argument("--threads", default="1", help="of each")
    parser.add_argument("--of", choices=EVERY, default="plan", help="which arms: the plan's four, or what was tried beside")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="of these arms, those named")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--write", action="store_true", help="train nothing")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not args.write:
        if args.data is None:
            sys.exit("--data: give the folder of CIFAR-100's binary version")
        # Seed by seed, so that what is there after any stop is paired.
        arms = EVERY[args.of]
        if unknown := set(args.only or []) - set(arms):
            sys.exit(f"--only: {', '.join(unknown)}: unknown; expected some of {', '.join(arms)}")
        with ThreadPoolExecutor(args.at_once) as pool:
            runs = [pool.submit(train, args, arms[name], seed) for seed in args.seeds for name in args.only or arms]
        for run in runs:
            run.result()
    write()


def lowest_ratio(run):
    """The lowest α/√C from the fall of the learning rate on; nothing without NBN."""
    ratios = [line["magnitudes"][0] / math.sqrt(CHANNELS) for line in run if line["magnitudes"] and line["epoch"] >= FALLS]
    return min(ratios) if ratios else None


def finished(arms):
    """The runs that are done: {name: {seed: lines}}."""
    found = {}
    for name, arm in arms.items():
        for seed in SEEDS:
            run = lines(arm, seed)
            if run and run[-1]["epoch"] == arm.epochs and answers(arm, seed):
                found.setdefault(name, {})[seed] = run
    return found


def write():
    planned = ARMS | TRIES
    insert("regime runs", table_of_runs(planned | BALANCED))
    insert("regime differences", table_of_differences(planned | BALANCED, PAIRS))
    insert("regime losses", table_of_losses(planned | BALANCED))
    insert("regime defaults", table_of_losses(DEFAULTS))
    insert("regime defaults differences", table_of_differences(DEFAULTS, DEFAULT_PAIRS))
    insert("regime strength", table_of_strength(planned))
    curves(finished(planned))


def decode(line):
    return np.frombuffer(base64.b64decode(line), np.uint8)


@functools.cache
def labels():
    return decode((FOLDER / "labels").read_text())


@functools.cache
def chosen(group):
    """Which test images are of a group."""
    least, most = GROUPS[group]
    return ((least <= COUNTS) & (COUNTS <= most))[labels()]


def right(arm, seed, readout):
    """1 for each test image that is answered rightly, 0 for the others."""
    return (decode(answers(arm, seed)[readout]) == labels()).astype(float)


def table_of_runs(arms):
    text = [
        "| network | seed | last epoch | many | medium | few | best | in epoch | α/√C in the end | lowest from epoch 96 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in finished(arms).items():
        for seed, run in seeds.items():
            evaluated = [line for line in run if "evaluation" in line]
            best = max(evaluated, key=lambda line: line["evaluation"]["overall"])
            end = run[-1]["evaluation"]
            cells = [f"{100 * v:.2f}" for v in (end["overall"], *(end["groups"][g] for g in ("many", "medium", "few")))]
            cells += [f"{100 * best['evaluation']['overall']:.2f}", str(best["epoch"])]
            low = lowest_ratio(run)
            cells += ["–", "–"] if low is None else [f"{run[-1]['magnitudes'][0] / math.sqrt(CHANNELS):.2f}", f"{low:.2f}"]
            text.append(f"| {name} | {seed} | " + " | ".join(cells) + " |")
    return text


def table_of_differences(arms, pairs):
    text = ["| | seeds | | overall | many | medium | few | without the prior |", "|---|---|---|---|---|---|---|---|"]
    runs = finished(arms)
    for name, base in pairs:
        seeds = sorted(set(runs.get(name, {})) & set(runs.get(base, {})))
        if not seeds:
            continue
        cells, images = [], []
        for group, readout in [*((group, LOGITS) for group in GROUPS), ("overall", FITTED)]:
            by_seed = [(right(arms[name], seed, readout) - right(arms[base], seed, readout))[chosen(group)] for seed in seeds]
            of_seeds = [100 * pair.mean() for pair in by_seed]
            half = T * np.std(of_seeds, ddof=1) / math.sqrt(len(SEEDS)) if seeds == SEEDS else None
            cells.append(interval(np.mean(of_seeds), half))
            of_images = 100 * np.mean(by_seed, axis=0)
            random = np.random.default_rng(0)
            means = [of_images[random.integers(0, len(of_images), len(of_images))].mean() for _ in range(2000)]
            low, high = np.percentile(means, [2.5, 97.5])
            images.append(f"[{low:+.2f}, {high:+.2f}]")
        title = f"{name} − " + (f"({base})" if "+" in base else base)
        text.append(f"| {title} | {len(seeds)} | over seeds | " + " | ".join(cells) + " |")
        text.append("| | | over images | " + " | ".join(images) + " |")
    return text


def interval(mean, half):
    return f"{mean:+.2f}" + (f" [{mean - half:+.2f}, {mean + half:+.2f}]" if half is not None else "")


def table_of_losses(arms):
    """Accuracy in each of the three ways; means over the seeds."""
    text = [
        "| network | seeds | by logits | few | τ = 1 | few | τ fitted | few | τ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in finished(arms).items():
        arm = arms[name]
        means = [
            100 * statistics.mean(float(right(arm, seed, readout)[chosen(group)].mean()) for seed in seeds)
            for readout in READOUTS
            for group in ("overall", "few")
        ]
        strengths = [float(tau) for seed in seeds for tau in answers(arm, seed)[-1].split()]
        cells = [f"{mean:.2f}" for mean in means] + [f"{min(strengths):.2f} to {max(strengths):.2f}"]
        text.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return text


def table_of_strength(arms):
    runs = finished(arms)
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
