#!/usr/bin/env python3
"""Spreads a run of `nbn score` over a Ray cluster: one task a share, tried again on another node when its node is lost.

    python score.py --shards 16 --output-dir /shared/rows -- --model /shared/models/mine /shared/photos

What follows `--` goes to `nbn score`. Photos, models and the output folder must be the same folders on every node. A share
that is tried again goes on after its last committed part, so no image is scored twice and none is left out.
"""

import argparse
import ctypes
import signal
import subprocess
import sys

import ray


def die_with_parent():
    """Linux: when the worker is gone, its scorer must not go on beside the one that replaces it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def score(program, shard, shards, folder, arguments):
    line = [program, "score", "--shard", f"{shard}/{shards}", "--output-dir", folder, "--resume", "--errors-exit-zero"]
    done = subprocess.run([*line, *arguments], stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
    if done.returncode != 0:
        raise RuntimeError(f"share {shard} of {shards}: status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stderr.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, required=True, help="several times the nodes, so that a lost one costs little")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--program", default="nbn", help="path of nbn on the nodes")
    parser.add_argument("--cpus", type=float, default=1, help="processors of a share, and its workers unless nbn score is given --workers")
    parser.add_argument("--retries", type=int, default=5)
    parser.add_argument("--address", default="auto", help="of the cluster")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="-- and the arguments of nbn score")
    options = parser.parse_args()
    arguments = [a for a in options.arguments if a != "--"]
    if not any(a.split("=")[0] == "--workers" for a in arguments):
        # Not a worker for each processor of the node: other shares are on it, too.
        arguments = ["--workers", str(max(1, int(options.cpus))), *arguments]
    ray.init(address=options.address, log_to_driver=False)
    task = ray.remote(num_cpus=options.cpus, max_retries=options.retries, retry_exceptions=True)(score)
    pending = {
        task.remote(options.program, shard, options.shards, options.output_dir, arguments): shard
        for shard in range(options.shards)
    }
    failed = 0
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        shard = pending.pop(done)
        try:
            print(f"share {shard}: {ray.get(done).splitlines()[0]}", flush=True)
        except ray.exceptions.RayError as error:
            failed += 1
            print(f"share {shard} failed: {error}", file=sys.stderr, flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
