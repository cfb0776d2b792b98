"""What one would write without nbn: a process per processor, Pillow, ONNX Runtime, JSON lines.

    BUNDLE=models/cifar10-lt/1 python3 benches/others/batch.py list.txt
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

from network import Network

network = None


def begin():
    global network
    network = Network()


def classify(path):
    return json.dumps({"path": path, "predictions": network.classify(Path(path).read_bytes())})


if __name__ == "__main__":
    paths = Path(sys.argv[1]).read_text().split("\n")[:-1]
    with multiprocessing.Pool(os.cpu_count(), begin) as pool:
        for line in pool.imap(classify, paths, chunksize=4):
            print(line)
