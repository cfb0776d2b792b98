#!/usr/bin/env python3
"""Measures what a bundle withholds as unlike its training images: noise, flat colours, rendered text and drawn traffic signs,
which this script makes, and the folders of pictures that it is given.

    python3 tests/oracle/unlike_training.py BUNDLE TEST_SET [FOLDER ...] [--fold target/release/fold] [--pictures DIR]

Needs numpy and Pillow. docs/calibration.md, "Unlike the training images", has its tables.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 96
RED, WHITE, BLUE = (200, 20, 20), (255, 255, 255), (20, 60, 190)


def noise(random):
    return Image.fromarray(random.integers(0, 256, (32, 32, 3)).astype(np.uint8))


def flat(random):
    return Image.new("RGB", (32, 32), tuple(int(v) for v in random.integers(0, 256, 3)))


def text(random):
    image = Image.new("RGB", (160, 160), "white")
    draw = ImageDraw.Draw(image)
    for y in range(4, 150, 22):
        line = "".join(chr(int(c)) for c in random.integers(97, 123, 18))
        draw.text((4, y), line, fill=(10, 10, 10), font=ImageFont.load_default(size=16))
    return image


def sign(random):
    """A stop sign, a speed limit, a warning or an arrow, on a plain ground."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in random.integers(60, 220, 3)))
    draw = ImageDraw.Draw(image)
    kind = random.integers(0, 4)
    x, y = SIZE // 2 + random.integers(-6, 7, 2)
    r = int(random.integers(26, 42))
    disc = (x - r, y - r, x + r, y + r)
    if kind == 0:
        turns = np.arange(8) * np.pi / 4 + np.pi / 8
        draw.polygon([(x + r * np.cos(t), y + r * np.sin(t)) for t in turns], fill=RED, outline=WHITE, width=3)
        draw.text((x - r * 0.6, y - 8), "STOP", fill=WHITE, font=ImageFont.load_default(size=r * 0.5))
    elif kind == 1:
        draw.ellipse(disc, fill=WHITE, outline=RED, width=max(4, r // 5))
        limit = str(int(random.integers(2, 13) * 10))
        draw.text((x - r * 0.4, y - r * 0.4), limit, fill="black", font=ImageFont.load_default(size=r * 0.7))
    elif kind == 2:
        draw.polygon([(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)], fill=WHITE, outline=RED, width=max(3, r // 6))
        draw.line((x, y - r * 0.3, x, y + r * 0.4), fill="black", width=4)
    else:
        draw.ellipse(disc, fill=BLUE, outline=WHITE, width=2)
        arrow = [(-0.5, -0.15), (0.1, -0.15), (0.1, -0.4), (0.6, 0), (0.1, 0.4), (0.1, 0.15), (-0.5, 0.15)]
        draw.polygon([(x + r * a, y + r * b) for a, b in arrow], fill=WHITE)
    return image


MADE = {"noise": (noise, 1000), "flat colours": (flat, 1000), "text": (text, 300), "signs": (sign, 500)}


def make(folder):
    """The pictures of each kind, in a folder of its own."""
    for seed, (name, (draw, count)) in enumerate(MADE.items()):
        random = np.random.default_rng(seed)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            draw(random).save(folder / name / f"{number:04}.png")
    return [folder / name for name in MADE]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--fold", default="target/release/fold")
    parser.add_argument("--pictures", type=Path, help="keep the pictures that are made there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        made = make(args.pictures or Path(temporary) / "pictures")
        print("| pictures | AUROC | 0.01 | 0.05 | 0.1 |\n|---|---|---|---|---|")
        for number, folder in enumerate([*made, *args.folders]):
            report = Path(temporary) / "report"
            subprocess.run([args.fold, "evaluate", args.bundle, "--data", args.test, "--unlike-data", folder,
                            "--report", report, "--resamples", "20"], check=True, capture_output=True)
            found = json.loads((report / "report.json").read_text())["evaluation"]["familiarity"]

            def row(name, auroc, shares):
                print(f"| {name} | {auroc} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")

            if number == 0:
                for own in found["withheld"]:
                    row(f"test, {own['slice']}", "", own["shares"])
            foreign = found["foreign"]
            row(f"{foreign['data']}, {foreign['images']}", f"{foreign['auroc']:.3f}", foreign["shares"])


if __name__ == "__main__":
    main()
