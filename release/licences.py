#!/usr/bin/env python3
"""Prints the licences of every crate that the programs are made of, each text once, as their terms ask for.

    release/licences.py [--features LIST]
"""

import argparse
import collections
import json
import pathlib
import subprocess
import sys

NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE")


def texts(folder):
    """The files of a crate that have its terms."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.upper().startswith(NAMES)]
    # mozjpeg-sys has those of the library inside.
    found += [path for path in sorted(folder.glob("vendor/LICENSE*"))]
    return found


def packages(features):
    """Crates of the normal and build dependencies, by cargo's own resolution."""
    command = ["cargo", "tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}", "--features", features]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = {tuple(line.split()[:2]) for line in lines if line.strip()}
    metadata = json.loads(subprocess.run(
        ["cargo", "metadata", "--locked", "--format-version", "1"], check=True, capture_output=True, text=True).stdout)
    for package in sorted(metadata["packages"], key=lambda p: (p["name"], p["version"])):
        if package["source"] and (package["name"], "v" + package["version"]) in wanted:
            yield package


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default="")
    by_text, without = collections.defaultdict(list), []
    for package in packages(parser.parse_args().features):
        name = f'{package["name"]} {package["version"]} ({package["license"] or "see its file"})'
        files = texts(pathlib.Path(package["manifest_path"]).parent)
        if not files:
            without.append(name)
        for path in files:
            by_text[path.read_text(errors="replace").strip()].append(name)
    print("The programs nbn and nbn-fold contain these crates. Each text below is preceded by those that come with it.\n")
    print("This software is based in part on the work of the Independent JPEG Group.\n")
    if without:
        print("These crates name their licence and bring no text of their own:\n")
        print("".join(f"    {name}\n" for name in without))
    for text, names in sorted(by_text.items(), key=lambda item: item[1]):
        print("-" * 100)
        print("".join(f"    {name}\n" for name in sorted(set(names))))
        print(text + "\n")
    print(f"{sum(map(len, by_text.values()))} texts of crates, {len(without)} crates without one", file=sys.stderr)


if __name__ == "__main__":
    main()
