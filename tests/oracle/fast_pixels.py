"""What `--pixels fast` does to large photos: time, pixels, scores.

    python tests/oracle/fast_pixels.py WORK BUNDLE --nbn target/release/nbn --pictures FOLDER

Enlarges the photos to 12 megapixels (JPEG, quality 90), decodes them with Pillow as `nbn` does, whole and by its draft
mode, which is the same scaled transform, and scores them with `nbn score` both ways. Needs numpy and Pillow.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy
from PIL import Image

SIZE = (4000, 3000)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--nbn", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = args.work / "large"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(args.pictures.glob("*.jpg")):
        if not (folder / file.name).exists():
            image = Image.open(file).convert("RGB").resize(SIZE, Image.LANCZOS)
            image.save(folder / file.name, quality=90)
    settings = json.loads((args.bundle / "manifest.json").read_text())["preprocessing"]
    side = settings.get("resize", {}).get("shorter-side") or settings.get("shorter_side")
    pixels(sorted(folder.glob("*.jpg"))[:20], side)
    rows, times = {}, {mode: [] for mode in ("exact", "fast")}
    for _ in range(args.rounds):
        for mode in times:
            started = time.process_time(), time.time()
            command = [args.nbn, "score", "--model", args.bundle, "--top-k", "1", "--probabilities", "--pixels", mode, folder]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
            times[mode].append(time.time() - started[1])
            rows[mode] = [json.loads(line) for line in done.stdout.splitlines()]
    images = len(rows["exact"])
    exact, fast = (numpy.array([row["probabilities"] for row in rows[mode]]) for mode in ("exact", "fast"))
    agreed = (exact.argmax(1) == fast.argmax(1)).mean()
    median = {mode: sorted(values)[len(values) // 2] for mode, values in times.items()}
    print(f"{images} photos of {SIZE[0]}x{SIZE[1]}: {images / median['exact']:.1f} images/s exact, "
          f"{images / median['fast']:.1f} fast ({median['exact'] / median['fast']:.2f} times as many)")
    difference = numpy.abs(exact - fast).max(1)
    print(f"scores differ by up to {difference.max():.3f} (median {numpy.median(difference):.4f}); "
          f"the best class is the same for {100 * agreed:.1f} %")


def pixels(files, side):
    """Largest differences of prepared pixels, and the times of decoding."""
    largest, mean, times = [], [], [[], []]
    for file in files:
        prepared = []
        for number, fast in enumerate((False, True)):
            image = Image.open(file)
            started = time.process_time()
            if fast:
                image.draft("RGB", tuple(2 * side * length // min(image.size) for length in image.size))
            image.load()
            times[number].append(time.process_time() - started)
            scale = side / min(image.size)
            size = tuple(max(side, int(length * scale)) for length in image.size)
            prepared.append(numpy.asarray(image.resize(size, Image.BILINEAR), "int16"))
        if prepared[0].shape == prepared[1].shape:
            difference = numpy.abs(prepared[0] - prepared[1])
            largest.append(difference.max())
            mean.append(difference.mean())
    middle = [1000 * sorted(values)[len(values) // 2] for values in times]
    print(f"decoding takes {middle[0]:.0f} ms exactly and {middle[1]:.0f} ms fast; resized to {side} pixels, "
          f"they differ by up to {max(largest)} of 255, {numpy.mean(mean):.2f} on average")


if __name__ == "__main__":
    main()
