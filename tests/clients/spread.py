#!/usr/bin/env python3
"""deploy/ray/score.py on a Ray cluster of two nodes, one of which is killed midway: its rows are those of one process.

    spread.py PROGRAM [--images 2000] [--shards 8]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from batch import pictures, rows
from common import Report
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parent.parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=8)
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images, out = work / "images", work / "rows"
        pictures(images, options.images)
        score = ["--model", str(ROOT / "models/cifar10-lt"), "--workers", "1", "--cache", str(work / "cache")]
        program = str(options.program.resolve())
        whole = subprocess.run([program, "score", *score, str(images)], capture_output=True, text=True, check=True).stdout
        # The head has no place for tasks, so that the two nodes have them all.
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        with report.check("a Ray run with a node killed midway equals one process") as figures:
            line = [sys.executable, str(ROOT / "deploy/ray/score.py"), "--shards", str(options.shards)]
            line += ["--output-dir", str(out), "--program", program, "--address", cluster.address, "--", *score, "--part-rows", "25", str(images)]
            run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while run.poll() is None and len(list(out.glob("part-*"))) < 2 * options.images // 25 // options.shards:
                time.sleep(0.02)
            before = len(rows(out))
            # Not gently: as when the machine loses power.
            cluster.remove_node(nodes[1], allow_graceful=False)
            said, wrong = run.communicate(timeout=600)
            assert run.returncode == 0, (said[-500:], wrong[-2000:])
            key = lambda row: row["path"]
            got = sorted(rows(out), key=key)
            want = sorted((json.loads(line) for line in whole.splitlines()), key=key)
            assert 0 < before < len(want), before
            assert got == want, (len(got), len(want))
            figures.append(f"killed at {before} of {len(want)} rows")
        cluster.shutdown()
    raise SystemExit(report.end())


if __name__ == "__main__":
    main()
