"""Exports every checkpoint that field_checkpoints.py wrote, and compares the bundles with the networks' own logits.

    python tests/oracle/field_table.py FOLDER --fold target/release/fold [--markdown] [--only NAME,...]

Without flags first, with `--expect` then, and with the flags of FLAGS where a file needs them. Prints one line for each
file: the largest difference in standard deviations of the logits, or the message. Needs numpy and onnxruntime; the exit
status is 1 when a file does not do what FOLDER/table.json says.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import onnxruntime

# What a user has to say of these files.
FLAGS = {
    "ldam_resnet32_normed": ["--classifier-form", "cosine:1"],
    "bag_fc_norm": ["--classifier-form", "cosine:1"],
    "torchvision_trainer_ema": ["--weights", "model"],
    "timm_trainer_ema": ["--weights", "state_dict"],
    "mmpretrain_resnet50_ema": ["--weights", "state_dict"],
    "mmcls_resnet50_ema": ["--ignore", "ema_"],
    "two_both_prefixes": ["--weights", "."],
    "two_ema_beside": ["--weights", "state_dict"],
    "two_swa_beside": ["--weights", "model"],
    "two_ema_inside": ["--weights", "state_dict.model"],
    "two_student_teacher": ["--weights", "student"],
    "ride_cifar_ea": ["--ignore", "expert_help_pred"],
    "ride_imagenet_ea": ["--ignore", "expert_help_pred"],
    "beside_assorted": ["--ignore", "parameter"],
    "beside_assorted_legacy": ["--ignore", "parameter"],
    "hf_stride_on_first": ["--stride-in", "conv1"],
    "stride_on_conv1": ["--stride-in", "conv1"],
    "batch_norm_eps": ["--batch-norm-epsilon", "1e-3"],
    "leaky_relu": ["--activation", "leaky-relu:0.1"],
    "silu": ["--activation", "silu"],
    "no_max_pool": ["--stem-pool", "none"],
    "max_pool_head": ["--global-pool", "max"],
    "cosine_unused_bias": ["--classifier-form", "cosine:16"],
    "cosine_no_bias": ["--classifier-form", "cosine:16"],
}
TOLERANCE = 1e-4


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fold", type=Path, required=True)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--only")
    args = parser.parse_args()
    table = json.loads((args.folder / "table.json").read_text())
    only = set(args.only.split(",")) if args.only else None
    failed = 0
    for entry in table:
        if only and Path(entry["name"]).name not in only:
            continue
        with tempfile.TemporaryDirectory() as place:
            result, good = one(args.fold, args.folder, entry, Path(place))
        failed += not good
        name, mark = entry["name"], "" if good else "  <-- WRONG"
        if args.markdown:
            print(f"| {entry['code_base']} | `{name}` | {result}{mark} |")
        else:
            print(f"{name}: {result}{mark}", flush=True)
    print(f"{failed} of {len(table)} are not as table.json says", file=sys.stderr)
    return failed > 0


def one(fold, folder, entry, place):
    """What happens to one file, in words, and whether it should."""
    name = Path(entry["name"]).name
    path = folder / entry["file"]
    if not entry.get("npz"):
        code, message, _ = export(fold, path, place)
        return message, code == 1 and ("damaged" not in message or name in DAMAGED)
    expected = numpy.load(folder / entry["npz"])
    side = str(expected["x"].shape[-1])
    flags = FLAGS.get(name, [])
    plain = export(fold, path, place, "--input-size", side)
    told = [describe(plain, expected)]
    good = True
    lookalike = entry["name"].startswith("lookalike/") and name not in RIGHT_BY_DEFAULT
    if lookalike:
        certificate = json.loads((plain[2] / "manifest.json").read_text())["fold"]["proof"] if plain[0] == 0 else {}
        good &= plain[0] == 0 and difference(plain[2], expected["x"], expected["y"]) > TOLERANCE and bool(certificate["assumed"])
        held = export(fold, path, place, "--expect", expect(expected, "y", place))
        good &= held[0] == 1
        told.append(f"with --expect: {held[1]}")
    elif (entry["expect"] == "export" or name in RIGHT_BY_DEFAULT) and not flags:
        good &= plain[0] == 0 and difference(plain[2], expected["x"], expected["y"]) <= TOLERANCE
        held = export(fold, path, place, "--expect", expect(expected, "y", place))
        good &= held[0] == 0
    elif entry["expect"] in ("refuse", "flag") and name not in ("ldam_resnet32_normed", "bag_fc_norm"):
        again = [export(fold, path, place, "--input-size", side) for _ in range(4)]
        good &= plain[0] == 1 and all(other[:2] == plain[:2] for other in again)
    if flags:
        runs = [export(fold, path, place, "--input-size", side, *flags) for _ in range(5)]
        right = "y_all" if "y_all" in expected else "y"
        good &= runs[0][0] == 0 and difference(runs[0][2], expected["x"], expected[right]) <= TOLERANCE
        good &= len({digest(run[2]) for run in runs if run[0] == 0}) == 1
        told.append(f"`{' '.join(flags)}`: {describe(runs[0], expected, right)}")
    return "; ".join(told), good


# The other half of a pair that no file tells apart: of LDAM's cosines and their 30-fold, one is what is taken.
RIGHT_BY_DEFAULT = {"cifar_normed_times_30"}
DAMAGED = {"truncated.pth", "broken.safetensors"}


def expect(expected, key, place):
    file = place / "expected.npz"
    numpy.savez(file, x=expected["x"], y=expected[key])
    return str(file)


def export(fold, path, place, *flags):
    """Exit status, message, and the bundle's folder."""
    out = place / str(len(list(place.iterdir()))) / "1"
    command = [str(fold), "export", str(path), "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), (command, done)
    message = done.stderr.strip().removeprefix("nbn fold: ").replace(str(path), path.name)
    return done.returncode, re.sub(r"\S*expected.npz: ", "", message), out


def describe(run, expected, key="y"):
    if run[0] == 1:
        return run[1]
    return f"{difference(run[2], expected['x'], expected[key]):.1e}"


def difference(bundle, x, y):
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"images": x.astype(numpy.float32)})[0]
    return float(numpy.abs(found - y).max() / y.std())


def digest(bundle):
    files = sorted(bundle.iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
